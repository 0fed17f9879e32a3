"""Times of a case, all paths in one process and interleaved; and whether the paths give the same numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eval.speed import decode, floor, labels, stage1, stage2
from eval.speed.cases import Case, Path
from latent_sft.method.types import Superposition

PARTS: dict[str, ModuleType] = {
    "stage1": stage1,
    "decoder": stage1,
    "stage2": stage2,
    "labels": labels,
    "decode": decode,
    "step": decode,
    "quickstart": decode,
}
"""Part -> the module with its `cases`, `build` and `small`."""
TOLERANCE = 1e-4
# share of labels with another entry at the k-th place: where two logits are as good as equal, rounding decides
TIES = 1e-3
# cases whose paths are compared before anything is timed
CHECKED_UP_TO = 512


def all_cases(quick: bool) -> list[Case]:
    """Return every case in the order of measurement."""
    return [case for module in (stage1, stage2, labels, decode) for case in module.cases(quick)]


def times(case: Case, device: str, repeats: int, tick: Callable[[str], object]) -> dict[str, Any]:
    """Time a case: a warm-up of each path on a tiny case of its kind, then A B A B ... `repeats` times.

    Args:
        case: what to time.
        device: `cpu` or `cuda`.
        repeats: timed calls of each path.
        tick: called with the path after every call.

    Returns:
        The case as a dictionary with `seconds` and `prepare_seconds` (path -> raw times), `flops` (path -> floor of one
        call), and for decoding `steps` (path -> thinking steps of every problem).
    """
    module = PARTS[case.part]
    for name, path in module.build(module.small(case), device).items():
        if name in case.paths:
            path.step(path.prepare())
    paths = {name: path for name, path in module.build(case, device).items() if name in case.paths}
    found: dict[str, Any] = {**dataclasses.asdict(case), "seconds": {}, "prepare_seconds": {}, "flops": {}}
    batches: dict[str, Any] = {}
    for name, path in paths.items():
        batches[name], seconds = _timed(path.prepare, device)
        found["prepare_seconds"][name] = [seconds]
        found["seconds"][name] = []
    for _ in range(repeats):
        for name, path in paths.items():
            path.module.zero_grad(set_to_none=True)
            result, seconds = _timed(partial(path.step, batches[name]), device)
            found["seconds"][name].append(seconds)
            _describe(found, case, name, result)
            tick(name)
    for path in paths.values():
        path.module.zero_grad(set_to_none=True)
    return found


def _describe(found: dict[str, Any], case: Case, name: str, result: Any) -> None:
    if PARTS[case.part] is not decode:
        share = case.items[case.paths.index(name)] / max(case.items)
        found["flops"][name] = floor.of_case(case) * share
    elif name != "plain":
        prompts = decode.prompts_of(case, name)
        found["flops"][name] = floor.of_decoding(case.size, prompts, result)
        found.setdefault("steps", {})[name] = [row.num_steps for row in result]
    else:
        found.setdefault("steps", {})[name] = [len(row.latent.ids) for row in result]


def differences(case: Case, device: str) -> dict[str, Any]:
    """Compare the plain path with every other one.

    Returns:
        `case` and relative differences: `loss` and `gradient` (the largest over parameters, of the largest entry); for
        labels `ids` (share of latents with other ids) and `weights`; for decoding `problems` (share of problems with
        other latents or another answer).
    """
    if case.part == "stage1":
        case = stage1.without_ties(case, device)
    paths = PARTS[case.part].build(case, device)
    results = {name: path.step(path.prepare()) for name, path in paths.items() if name in case.paths}
    found: dict[str, Any] = {"case": f"{case.part}: {case.name}"}
    reference = results.pop("plain")
    if case.part == "decode":
        found["problems"] = max(_other_problems(reference, rows) for rows in results.values())
    elif case.part == "labels":
        found.update(_other_labels(reference, results["fast"]))
    else:
        found["loss"] = float((results["fast"] - reference).abs() / reference.abs())
        found["gradient"] = _other_gradients(paths["plain"], paths["fast"])
        paths["plain"].module.zero_grad(set_to_none=True)
        paths["fast"].module.zero_grad(set_to_none=True)
    return found


def checked(cases: list[Case]) -> list[Case]:
    """Return the cases to compare: those with a plain path that are not long."""
    return [c for c in cases if c.timed and "plain" in c.paths and max(c.cot) <= CHECKED_UP_TO]


def is_same(difference: dict[str, Any]) -> bool:
    """Return whether a result of `differences` is within the tolerance."""
    allowed = {"ids": TIES}
    return all(value <= allowed.get(key, TOLERANCE) for key, value in difference.items() if key != "case")


def _other_gradients(plain: Path, fast: Path) -> float:
    expected = {name: p.grad for name, p in plain.module.named_parameters()}
    worst = 0.0
    for name, parameter in fast.module.named_parameters():
        a, b = expected[name], parameter.grad
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise AssertionError(f"{name}: only one path has a gradient")
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)))
    return worst


def _other_labels(expected: list[Superposition], found: list[Superposition]) -> dict[str, float]:
    # neighbours in the order of weights may swap within rounding; that is the same latent
    ids = weights = total = 0.0
    for a, b in zip(expected, found, strict=True):
        same = (a.ids.cpu().sort(-1).values == b.ids.sort(-1).values).all(-1)
        ids, total = ids + float((~same).sum()), total + len(same)
        gap: Tensor = (a.weights.cpu() - b.weights).abs().max(-1).values * same
        weights = max(weights, float(gap.max()) if len(gap) else 0.0)
    return {"ids": ids / max(1.0, total), "weights": weights}


def _other_problems(expected: list[Any], found: list[Any]) -> float:
    others = 0
    for i, b in enumerate(found):
        a = expected[i % len(expected)]  # the problems repeat, see decode.prompts_of
        same_length = len(a.latent.ids) == b.num_steps and a.answer_ids == b.answer_ids
        others += not (same_length and torch.equal(a.latent.ids[:, 0].cpu(), b.latent_ids[:, 0]))
    return others / len(found)


def _timed(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    floor.synchronise(device)
    start = time.perf_counter()
    result = call()
    floor.synchronise(device)
    return result, time.perf_counter() - start
