"""Exports in the wheel of vLLM, on a CPU, against the engine.

`LATENT_SFT_VLLM_PYTHON` is the interpreter of an environment with vLLM, a CPU build of torch, triton and this package
(docs/vllm.md). The wheel has kernels for GPUs only: Triton interprets its own, `serve/vllm_cpu` stands in for others.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from inference.test_thoughts import thoughts_of

from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.prompts import build_spec, render_prompt
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.inference.show import load
from latent_sft.inference.solve import solve
from latent_sft.method.types import ThoughtSpec
from latent_sft.models.load import build_tiny, save_lm, save_thinker
from latent_sft.models.thoughts import save_thoughts
from latent_sft.models.tiny_tokenizer import build_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]
PYTHON = os.environ.get("LATENT_SFT_VLLM_PYTHON", "")
HERE = Path(__file__).parent
CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # a busy machine may take long to start
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
}
CASES = {
    # pages for a few requests only, prompts read in pieces
    "llama": (None, {"num_gpu_blocks_override": 8, "max_num_batched_tokens": 24}, 6),
    "gpt2": (ThoughtSpec(num_latents=5, iterations=5, projection=True), {}, 0),
    "qwen2": (None, {"tensor_parallel_size": 2}, 0),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return the environment of vLLM's processes, which find the stand-ins as a plugin."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copy(HERE.parent / "serve/vllm_cpu/latent_sft_cpu_ops.py", folder)
    info = folder / "cpu_ops-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu_ops\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_ops = latent_sft_cpu_ops:register\n")
    return {**os.environ, **CPU, "PYTHONPATH": str(folder), "VLLM_CACHE_ROOT": str(folder / "cache")}


def exported(folder: Path, family: str, how: ThoughtSpec | None) -> Path:
    """Return the export of a random model that thinks and answers at different lengths."""
    tokenizer = build_tokenizer(["0 1 2 3 4 5 6 7 8 9 +"], TinyModelConfig(), PromptConfig())
    latent = LatentConfig(top_k=4, max_latents=9, max_answer_tokens=7, min_latents=2)
    spec = build_spec(tokenizer, PromptConfig(), latent, len(tokenizer))
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 96}
    model = build_tiny(TinyModelConfig(model_type=family, max_positions=128, **sizes), tokenizer, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # with twice that, rounding alone (1e-5 of the embeddings) changes 3 of 100 thoughts
                parameter.normal_(0, 0.15, generator=generator)
    save_lm(model, folder / "final", tokenizer)
    save_thinker(folder / "final", spec, "latent" if how is None else how.thinker, how)
    if how is not None:
        save_thoughts(thoughts_of(model, how), folder / "final")
    return export_checkpoint(folder / "final", folder / "export")


@pytest.mark.parametrize("family", CASES)
def test_latents_and_answers_equal_the_engine(family, tmp_path, environment):
    assert PYTHON, "set LATENT_SFT_VLLM_PYTHON to the interpreter of an environment with vLLM (docs/vllm.md)"
    how, options, aborts = CASES[family]
    export, rng = exported(tmp_path, family, how), random.Random(3)
    reasoner = load(export)
    problems = [" + ".join(str(rng.randrange(10)) for _ in range(rng.randint(10, 22))) for _ in range(64)]
    prompts = [list(render_prompt(reasoner.tokenizer, reasoner.spec, problem)) for problem in problems]
    rows = solve(reasoner.thinker, reasoner.spec, [{"prompt": p} for p in prompts], batch_size=8, max_cot_tokens=9)
    job = tmp_path / "job.json"
    asked = {"export": str(export), "options": options, "prompts": prompts, "aborts": aborts, "max_tokens": 20}
    job.write_text(json.dumps(asked))
    command = [PYTHON, str(HERE / "vllm_answers.py"), str(job)]
    # the engine and its worker are processes of their own where there are several workers, else one with the client
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int("tensor_parallel_size" in options))}
    ran = subprocess.run(command, env=environment | apart, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    found = json.loads(Path(f"{job}.out").read_text())
    assert sum(ids is not None for ids in found["outputs"]) >= 64 - aborts
    assert aborts == 0 or None in found["outputs"]
    spec, different = reasoner.spec, []
    special = (spec.eos_id, spec.end_think_ids[0])
    for ids, row in zip(found["outputs"], rows, strict=True):
        words = [spec.think_ids[-1] if word in special else word for word in row.latent_ids[:, 0].tolist()]
        expected = [*words, *spec.end_think_ids, *row.answer_ids, *[spec.eos_id] * row.finished]
        if ids is not None and ids[: len(expected)] != expected:
            different.append((ids, expected))
    assert not different
    assert how is not None or len({row.num_steps for row in rows}) > 2
    assert "num_gpu_blocks_override" not in options or found["metrics"]["vllm:num_preemptions"] > 0
