"""lm-eval itself, with its Hugging Face model and nothing of this package, scores an export as this package does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from latent_sft.data.prompts import render_prompt
from latent_sft.evaluation.answers import is_correct
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.inference.generate import generate
from latent_sft.method.types import LatentSpec

TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 16}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
SCORE = """
import json, sys
sys.modules["latent_sft"] = None  # importing it fails
import lm_eval
from lm_eval.tasks import TaskManager

folder, tasks = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False)
found = []
for batch in (1, 4, 16):
    out = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},trust_remote_code=True,device=cpu", tasks=["own"],
        task_manager=manager, batch_size=batch, apply_chat_template=True, bootstrap_iters=0)
    found.append(out["results"]["own"]["exact_match,none"])
try:
    model = f"pretrained={folder},device=cpu"
    lm_eval.simple_evaluate(model="hf", model_args=model, tasks=["own"], task_manager=manager)
    found.append("ran")
except ValueError as error:
    found.append(str(error))
print("\\n" + json.dumps(found))
"""


@pytest.mark.slow
def test_lm_eval_scores_as_this_package(
    checkpoint: Path, problems: list[str], tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, tmp_path: Path
) -> None:
    folder = export_checkpoint(checkpoint, tmp_path / "export")
    prompts = [render_prompt(tokenizer, spec, problem) for problem in problems]
    decoded = generate(AutoModelForCausalLM.from_pretrained(checkpoint), spec, prompts, thinker="latent")
    texts = [tokenizer.decode(row.answer_ids, skip_special_tokens=True) for row in decoded]  # as lm-eval decodes
    # right for some of the problems, and wrong for the rest
    answers = [text if i % 3 and text else "0 0 1" for i, text in enumerate(texts)]
    own = sum(is_correct(t, a, "text") for t, a in zip(texts, answers, strict=True)) / len(texts)
    assert 0 < own < 1
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "own.jsonl"
    data.write_text(
        "".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in zip(problems, answers, strict=True))
    )
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=data))
    run = subprocess.run(
        [sys.executable, "-c", SCORE, str(folder), str(tmp_path / "tasks")],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    *scores, untrusted = json.loads(run.stdout.splitlines()[-1])
    assert scores == pytest.approx([own] * 3)
    assert "trust_remote_code=True" in untrusted
