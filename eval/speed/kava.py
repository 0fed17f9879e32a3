"""A training step of KaVa against CODI's terms alone and a teacher that is read twice: `python -m eval.speed.kava`.

    kava       all four terms: the prompt is read once, the teacher once
    codi       the same without keys and values (kava.kv.weight=0)
    student    the student's cross-entropy alone
    published  all four terms as published code has them: targets from a pass without gradient, the teacher's
               cross-entropy from another one over prompt, steps and answer

First it is seen that `kava` and `published` give the same loss and gradients; then all are timed, interleaved, forward
and backward. Memory is that of a fresh process each: resident at the peak, beyond weights and a small step (Linux).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.speed.cases import FULL, TINY, Case, Size, build_lm, rows_of, spec_of
from eval.speed.floor import synchronise
from eval.speed.shared import resident
from latent_sft.method.types import ThoughtSpec
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.self_distill import SelfDistillConfig, SelfDistillModel, distill_batch, kava
from latent_sft.models.thoughts import Thoughts

PATHS = ("kava", "codi", "student", "published")
TOLERANCE = 1e-4
Step = Callable[[], Tensor]


def case_of(cot: int, rows: int = 8, size: Size = FULL) -> Case:
    """Return rows of prompts of 64 tokens, so many CoT tokens in four steps, and answers of 8."""
    return Case(part="kava", name=f"{rows} rows, CoT {cot}", size=size, cot=(cot,) * rows, prompt=64, answer=8)


def settings_of(path: str) -> SelfDistillConfig:
    """Return KaVa's settings with the terms of a path; M = 24 and T = 3."""
    every = kava()
    weight = 0.0 if path in ("codi", "student") else every.kv.weight
    others = 0.0 if path == "student" else 1.0
    return dataclasses.replace(
        every,
        kv=dataclasses.replace(every.kv, weight=weight),
        hidden_weight=every.hidden_weight * others,
        teacher_weight=0.0 if path == "published" else others,
    )


def build(case: Case, path: str, device: str) -> tuple[torch.nn.Module, Step]:
    """Return the model of a path, the same weights for all, and its step: loss of a batch, gradients added."""
    settings, spec = settings_of(path), spec_of(case.size)
    lm = build_lm(case.size, 0, device).train()
    thought_spec = ThoughtSpec(
        num_latents=settings.num_latents, iterations=settings.iterations, projection=settings.projection
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        thoughts = Thoughts(thought_spec, torch.randn(case.size.hidden) * 0.02).to(device)
    model = SelfDistillModel(lm, thoughts, spec, settings)
    rows = [{**row, "step_lengths": [len(row["cot"]) // 4] * 4} for row in rows_of(case)]
    batch = distill_batch(rows, spec, thought_spec, normalisation="token", drop_last_step=True, kv=settings.kv)
    batch = {name: x.to(device) for name, x in batch.items()}
    shown = [{**row, "cot": row["cot"][: 3 * row["step_lengths"][0]]} for row in rows]
    again = explicit_batch(shown, spec, with_cot=True, normalisation="token")
    again = {name: x.to(device) for name, x in again.items()}
    explicit = ExplicitModel(lm)
    weights = {"ce": 1.0, "teacher_ce": 1.0, "hidden": settings.hidden_weight, "kv": settings.kv.weight}

    def step() -> Tensor:
        out: dict[str, Any] = model(**batch)
        if path == "published":
            out["teacher_ce_total"] = explicit(**again)["ce_total"]
        terms = [
            weight * out[f"{name}_total"] / batch["counts"][i]
            for i, (name, weight) in enumerate(weights.items())
            if f"{name}_total" in out
        ]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss.detach()

    return model, step


def difference(case: Case, device: str) -> float:
    """Return the largest relative difference of loss and gradients between `kava` and `published`."""
    found = []
    for path in ("kava", "published"):
        model, step = build(case, path, device)
        found.append((step(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other, others) = found
    assert grads.keys() == others.keys()
    worst = float((loss - other).abs() / loss.abs())
    for name, gradient in grads.items():
        worst = max(worst, float((gradient - others[name]).abs().max() / gradient.abs().max().clamp(min=1e-12)))
    return worst


def times(case: Case, device: str, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step of each path, timed one after another `repeats` times."""
    built = {path: build(case, path, device) for path in PATHS}
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for round_number in range(repeats + 1):
        for path, (model, step) in built.items():
            model.zero_grad(set_to_none=True)
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if round_number:  # the first one warms up
                seconds[path].append(time.perf_counter() - start)
    return {path: statistics.median(values) for path, values in seconds.items()}


def peak_mib(case: Case, path: str, device: str) -> float:
    """Return MiB that a step takes at its peak beyond weights; to be called in a fresh process."""
    build(dataclasses.replace(case, cot=(8,)), path, device)[1]()
    _, step = build(case, path, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    step()
    return resident("VmHWM") - before


def main() -> None:
    """Show a line a case and path."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.kava", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cot", type=int, nargs="+", default=[32, 128], help="CoT tokens, a multiple of 4 each")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = TINY if options.quick else FULL
    if options.memory_of:
        sys.stdout.write(json.dumps(peak_mib(case_of(options.cot[0], size=size), options.memory_of, options.device)))
        return
    gap = difference(case_of(options.cot[0], size=size), options.device)
    sys.stdout.write(f"kava and published: largest relative difference {gap:.1e}\n")
    if gap > TOLERANCE:
        raise SystemExit("they do not agree")
    for cot in options.cot:
        case = case_of(cot, size=size)
        found = times(case, options.device, options.repeats)
        for path in PATHS:
            child = [sys.executable, "-m", "eval.speed.kava", "--memory-of", path, "--cot", str(cot)]
            child += ["--device", options.device, "--threads", str(options.threads), *["--quick"] * options.quick]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
            memory = float(done.stdout.splitlines()[-1])
            sys.stdout.write(
                f"{case.name}, {path:9}: {found[path]:.3f} s, {found[path] / found['codi']:.2f} of codi, "
                f"peak {memory:.0f} MiB\n"
            )


if __name__ == "__main__":
    main()
