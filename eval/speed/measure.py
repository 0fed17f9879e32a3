"""Times of a case, whether its paths give the same numbers, and their peak memory.

`python -m eval.speed.measure PART NAME PATH DEVICE THREADS QUICK` is the process whose memory is measured, which prints
a line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark

from eval.speed import cases, floor
from eval.speed.cases import Case, Way
from latent_sft.method.types import Superposition

GIB = 2**30
TOLERANCE = 1e-4
# share of labels with another entry at the k-th place: where two logits are as good as equal, rounding decides
TIES = 1e-3
# CoT tokens of the longest cases whose paths are compared
CHECKED_UP_TO = 512


def times(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Time a case: a warm-up of each path on a tiny case of its kind, then A B A B ... `repeats` times.

    Returns:
        The case as a dictionary with `seconds` and `prepare_seconds` (path -> raw times), `flops` (path -> floor of one
        call), and for decoding `steps` (path -> thinking steps of every problem).
    """
    for name, way in cases.build(cases.small(case), device).items():
        if name in case.paths:
            way.step(way.prepare())
    ways = {name: way for name, way in cases.build(case, device).items() if name in case.paths}
    found: dict[str, Any] = {**dataclasses.asdict(case), "seconds": {}, "prepare_seconds": {}, "flops": {}}
    batches = {}
    for name, way in ways.items():
        batches[name], seconds = _timed(way.prepare)
        found["prepare_seconds"][name], found["seconds"][name] = [seconds], []
    # in turns, so that other load on the machine meets every path: `benchmark.Timer` measures one after the other
    for _ in range(repeats):
        for name, way in ways.items():
            way.module.zero_grad(set_to_none=True)
            result, seconds = _timed(lambda way=way, name=name: way.step(batches[name]))
            found["seconds"][name].append(seconds)
            _describe(found, case, name, result)
    for way in ways.values():
        way.module.zero_grad(set_to_none=True)
    return found


def _timed(call: Any) -> tuple[Any, float]:
    start = benchmark.timer()  # waits for the accelerator
    result = call()
    return result, benchmark.timer() - start


def _describe(found: dict[str, Any], case: Case, name: str, result: Any) -> None:
    if case.part in ("stage1", "decoder", "stage2", "labels"):
        found["flops"][name] = floor.of_case(case) * case.items[case.paths.index(name)] / max(case.items)
    elif case.part != "kava":
        alone = name == "plain"
        found.setdefault("steps", {})[name] = [len(row.latent.ids) if alone else row.num_steps for row in result]
        if not alone:
            found["flops"][name] = floor.of_decoding(case.size, cases.prompts_of(case, name), result)


def checked(all_cases: list[Case]) -> list[Case]:
    """Return the cases to compare: those with a reference that are not long."""
    return [c for c in all_cases if c.timed and c.compared[0] in c.paths and max(c.cot) <= CHECKED_UP_TO]


def differences(case: Case, device: str) -> dict[str, Any]:
    """Compare the reference with the other path, in decoding with every other one.

    Returns:
        `case` and relative differences: `loss` and `gradient` (the largest over parameters, of the largest entry); for
        labels `ids` (share of latents with other ids) and `weights`; for decoding `problems` (share of problems with
        other latents or another answer).
    """
    if case.part == "stage1":
        case = cases.without_ties(case, device)
    ways = cases.build(case, device)
    found: dict[str, Any] = {"case": f"{case.part}: {case.name}"}
    reference, other = (ways[name] for name in case.compared) if case.part != "decode" else (ways["plain"], None)
    expected = reference.step(reference.prepare())
    if other is None:
        rest = [way.step(way.prepare()) for name, way in ways.items() if name != "plain"]
        return {**found, "problems": max(_other_problems(expected, rows) for rows in rest)}
    result = other.step(other.prepare())
    if case.part == "labels":
        return {**found, **_other_labels(expected, result)}
    found |= {"loss": float((result - expected).abs() / expected.abs()), "gradient": _other_gradients(reference, other)}
    for way in (reference, other):
        way.module.zero_grad(set_to_none=True)
    return found


def is_same(difference: dict[str, Any]) -> bool:
    """Return whether a result of `differences` is within the tolerance."""
    return all(value <= (TIES if key == "ids" else TOLERANCE) for key, value in difference.items() if key != "case")


def _other_gradients(reference: Way, other: Way) -> float:
    expected = {name: p.grad for name, p in reference.module.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in other.module.named_parameters() if p.grad is not None}
    if expected.keys() != found.keys():
        raise AssertionError(f"only one path has gradients of {', '.join(expected.keys() ^ found.keys())}")
    gaps = ((found[name] - a).abs().max() / a.abs().max().clamp(min=1e-12) for name, a in expected.items())
    return max(map(float, gaps))


def _other_labels(expected: list[Superposition], found: list[Superposition]) -> dict[str, float]:
    # neighbours in the order of weights may swap within rounding; that is the same latent
    a, b = (Superposition(*map(torch.cat, zip(*rows, strict=True))) for rows in (expected, found))
    same = (a.ids.cpu().sort(-1).values == b.ids.cpu().sort(-1).values).all(-1)
    gap: Tensor = (a.weights.cpu() - b.weights.cpu()).abs().max(-1).values * same
    return {"ids": float((~same).float().mean()), "weights": float(gap.max())}


def _other_problems(expected: list[Any], found: list[Any]) -> float:
    others = 0
    for i, b in enumerate(found):
        a = expected[i % len(expected)]  # the problems repeat, see cases.prompts_of
        same_length = len(a.latent.ids) == b.num_steps and a.answer_ids == b.answer_ids
        others += not (same_length and torch.equal(a.latent.ids[:, 0].cpu(), b.latent_ids[:, 0].cpu()))
    return others / len(found)


def memory_in_fresh_process(case: Case, path: str, device: str, threads: int, quick: bool) -> dict[str, Any]:
    """Measure in a child process, which is stopped where it grows beyond `case.limit_gib`; see `peak`.

    Raises:
        RuntimeError: the child failed.
    """
    arguments = [case.part, case.name, path, device, str(threads), str(int(quick))]
    command = [sys.executable, "-m", "eval.speed.measure", *arguments]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        if case.limit_gib and device == "cpu" and _resident(child.pid, "VmRSS") > case.limit_gib * GIB:
            child.kill()
            child.wait()
            return {"peak": None, "process_peak": None, "exceeded": True}
        time.sleep(0.05)
    text = child.stdout.read() if child.stdout is not None else ""
    if child.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case.part}, {case.name}, {path} failed; its message is above")
    return json.loads(text.splitlines()[-1])


def peak(case: Case, path: str, device: str) -> dict[str, Any]:
    """Measure what a step needs beyond weights, which are there and warm, in this process.

    On a CPU: the high-water mark of resident memory (VmHWM, Linux) minus resident memory right before. Layout, masks
    and gradients count. On CUDA: allocated bytes.

    Returns:
        `peak` bytes beyond weights, `process_peak` bytes in all, `weights` bytes, and `exceeded`: it reached
        `case.limit_gib`.
    """
    first = cases.build(cases.small(case), device)[path]
    first.step(first.prepare())
    way = cases.build(case, device)[path]
    way.module.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cpu":
        with contextlib.suppress(OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages back to the system, so that the level is low
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident("self", "VmRSS")
        way.step(way.prepare())
        high = _resident("self", "VmHWM")
    else:
        if case.limit_gib:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.limit_gib * GIB / total))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            way.step(way.prepare())
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return {"peak": None, "process_peak": None, "exceeded": True}
        high = torch.cuda.max_memory_allocated()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in way.module.parameters()}
    return {"peak": high - before, "process_peak": high, "weights": sum(weights.values()), "exceeded": False}


def _resident(process: int | str, field: str) -> int:
    """Return a line of /proc/PROCESS/status in bytes; 0 where the process has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


if __name__ == "__main__":
    part, name, path, device, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = next(c for c in cases.all_cases(quick == "1") if (c.part, c.name) == (part, name))
    sys.stdout.write(json.dumps(peak(case, path, device)) + "\n")
