"""lm-eval scores an export as this package does: by its own Hugging Face model, and by the model of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from latent_sft import cli
from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ConfigError
from latent_sft.evaluation.answers import is_correct
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.inference.generate import Sampling, generate
from latent_sft.inference.show import load
from latent_sft.method.types import LatentSpec
from latent_sft.serve.lm_eval import model_class

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


@pytest.fixture
def task(checkpoint: Path, problems: list[str], tmp_path: Path) -> Path:
    """Return a folder with an export, rows that it gets right in part, and a task of them."""
    (tmp_path / "tasks").mkdir()
    folder = export_checkpoint(checkpoint, tmp_path / "export")
    texts = [solution.answer for solution in load(folder).generate(problems)]
    answers = [text if i % 3 and text else "0 0 1" for i, text in enumerate(texts)]
    rows = [{"problem": p, "answer": a} for p, a in zip(problems, answers, strict=True)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=tmp_path / "own.jsonl"))
    return tmp_path


def command(task: Path, *words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    environ = {**os.environ, "HF_HOME": str(task / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *many, "-m", "latent_sft.cli", *words],
        **{"cwd": task, "env": environ, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL},
        check=False,
    )


def scored(task: Path, *words: str, processes: int = 1) -> dict[str, Any]:
    out = task / f"out-{len(list(task.iterdir()))}"
    asked = ("lm-eval", "export", "--tasks", "own", "--include_path", "tasks", "--output_path", str(out), *words)
    run = command(task, *asked, processes=processes)
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes that each import lm-eval
def test_the_command_scores_as_the_evaluation_does(task: Path) -> None:
    run = command(task, "eval", "export", "--data", "own.jsonl", "--out", "own", "eval.grader=text")
    assert run.returncode == 0, run.stderr[-3000:]
    own = json.loads((task / "own/eval/export/own.json").read_text())["summary"]["accuracy"]
    assert 0 < own < 1
    for words in ((), ("--apply_chat_template", "--batch_size", "3")):
        assert scored(task, *words)["results"]["own"]["exact_match,none"] == pytest.approx(own)
    two = scored(task, "--log_samples", processes=2)
    assert two["results"]["own"]["exact_match,none"] == pytest.approx(own)
    assert two["n-samples"]["own"]["effective"] == len((task / "own.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_log_likelihoods_are_refused_in_a_sentence(task: Path) -> None:
    choices = {"output_type: generate_until": "output_type: multiple_choice", "exact_match": "acc"}
    text = (
        (task / "tasks/own.yaml").read_text().replace("doc_to_target", 'doc_to_choice: ["1", "0 0 1"]\ndoc_to_target')
    )
    for old, new in choices.items():
        text = text.replace(old, new)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("generation_kwargs"))
    (task / "tasks/own.yaml").write_text(text.replace('"{{answer}}"', "0"))
    run = command(task, "lm-eval", "export", "--tasks", "own", "--include_path", "tasks")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: own: compares log-likelihoods, but ")
    assert "generate_until" in run.stderr.splitlines()[-1]


def asked(contexts: Sequence[str], **how: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    metadata = ("own", 0, 1)
    arguments = [(context, {"until": [], **how}) for context in contexts]
    return [
        Instance(request_type="generate_until", doc={}, arguments=a, idx=i, metadata=metadata)
        for i, a in enumerate(arguments)
    ]


@pytest.mark.slow
def test_answers_stop_where_they_are_told(checkpoint: Path, problems: list[str]) -> None:
    model = model_class()(pretrained=str(checkpoint), batch_size="auto:4")
    whole = model.generate_until(asked(problems))
    assert whole == [solution.answer for solution in load(checkpoint).generate(problems)]
    stop = next(word for text in whole for word in text.split()[1:])
    stopped = model.generate_until(asked(problems, until=["never", stop]))
    assert stopped == [text.split(stop)[0] for text in whole] != whole
    short = model.generate_until(asked(problems, max_gen_toks=2))
    assert [text.split() for text in short] == [text.split()[:2] for text in whole]
    longest = model_class()(pretrained=str(checkpoint), max_answer_tokens=9)
    for own, most in ((model, 7), (longest, 9)):
        assert max(len(text.split()) for text in own.generate_until(asked(problems, max_gen_toks=99))) == most
    # requests of several kinds in one call come back in their places
    mixed = asked(problems[:5], max_gen_toks=2) + asked(problems[5:])
    assert model.generate_until(mixed[::2] + mixed[1::2]) == [
        (short[:5] + whole[5:])[i] for i in (*range(0, 10, 2), *range(1, 10, 2))
    ]


@pytest.mark.slow
def test_sampling_and_lengths_are_as_asked(checkpoint: Path, problems: list[str], tmp_path: Path) -> None:
    reasoner, how = load(checkpoint), {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
    model = model_class()(pretrained=str(checkpoint))
    torch.manual_seed(5)
    prompts = [render_prompt(reasoner.tokenizer, reasoner.spec, problem) for problem in problems]
    sampling = Sampling(temperature=2.0, top_p=0.9, seed=5)
    expected = generate(reasoner.thinker.lm, reasoner.spec, prompts, thinker="latent", sampling=sampling)
    assert model.generate_until(asked(problems, **how)) == [reasoner.tokenizer.decode(d.answer_ids) for d in expected]
    # the same problem again is another draw
    assert len(set(model.generate_until(asked(problems[:1] * 12, **how)))) > 3
    for words, options in (
        ({"max_latents": 2, "min_latents": 2}, {"thinker": "latent"}),
        ({"thinker": "none"}, {"thinker": "none"}),
    ):
        lengths = {k: v for k, v in words.items() if k != "thinker"}
        spec = reasoner.adjusted(**lengths).spec
        decoded = generate(reasoner.thinker.lm, spec, prompts, **options)
        texts = [reasoner.tokenizer.decode(d.answer_ids) for d in decoded]
        assert model_class()(pretrained=str(checkpoint), **words).generate_until(asked(problems)) == texts
    with pytest.raises(ConfigError, match=r"--model_args: unknown argument 'thinkr'. Did you mean 'thinker'\?"):
        model_class()(pretrained=str(checkpoint), thinkr="none")


@pytest.mark.slow
def test_a_chat_template_gives_the_prompt_of_training(checkpoint: Path, problems: list[str], tmp_path: Path) -> None:
    model = model_class()(pretrained=str(export_checkpoint(checkpoint, tmp_path / "export")))
    whole = model.generate_until(asked(problems))
    assert model.chat_template(True)
    contexts = [model.apply_chat_template([{"role": "user", "content": problem}]) for problem in problems]
    assert contexts != problems
    assert model.generate_until(asked(contexts)) == whole
    assert model.generate_until(asked(problems)) == whole  # of the next evaluation, without the template
    with pytest.raises(ConfigError, match=r"one message with the role user"):
        model.apply_chat_template([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    with pytest.raises(ConfigError, match=r"has no chat template; leave that option out"):
        model_class()(pretrained=str(checkpoint)).apply_chat_template([{"role": "user", "content": "1"}])


@pytest.mark.slow
def test_a_prompt_that_the_model_cannot_hold_is_answered_by_nothing(checkpoint: Path, caplog: Any) -> None:
    model = model_class()(pretrained=str(checkpoint))
    assert model.generate_until(asked(["1 + " * 2000, "2 + 3"]))[0] == ""
    assert "1 of 2 prompts are longer than the 1024 positions of the model" in caplog.text


def test_without_lm_eval_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    model_class.cache_clear()
    assert cli.main(["lm-eval", "export", "--tasks", "gsm8k_cot", "--limit", "2"]) == 2
    assert "pip install 'latent_sft[lm-eval]'" in capsys.readouterr().err
