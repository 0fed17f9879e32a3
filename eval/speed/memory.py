"""Peak memory of one path of one case, measured in a fresh process each: what a step needs beyond weights.

On a CPU: the high-water mark of resident memory (VmHWM) minus resident memory right before, with weights loaded and a
tiny step done, so that kernels and thread pools are there. Layout, masks and gradients count. On CUDA: allocated bytes.

`python -m eval.speed.memory PART NAME PATH DEVICE THREADS QUICK` is the child; it prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path as File
from typing import Any

import torch

from eval.speed.cases import Case
from eval.speed.floor import synchronise
from eval.speed.measure import PARTS, all_cases

ROOT = File(__file__).parents[2]
GIB = 2**30


def in_fresh_process(case: Case, path: str, device: str, threads: int, quick: bool) -> dict[str, Any]:
    """Measure in a child process.

    Returns:
        `peak` bytes beyond weights, `process_peak` bytes in all, and `exceeded`: it was stopped at `case.limit_gib`.

    Raises:
        RuntimeError: the child failed.
    """
    arguments = [case.part, case.name, path, device, str(threads), str(int(quick))]
    child = subprocess.Popen(
        [sys.executable, "-m", "eval.speed.memory", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    limit = case.limit_gib * GIB
    while child.poll() is None:
        if limit and device == "cpu" and _resident(child.pid, "VmRSS") > limit:
            child.kill()
            child.wait()
            return {"peak": None, "process_peak": None, "exceeded": True}
        time.sleep(0.05)
    text = child.stdout.read() if child.stdout is not None else ""
    if child.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case.part}, {case.name}, {path} failed; its message is above")
    return json.loads(text.splitlines()[-1])


def peak(case: Case, path: str, device: str) -> dict[str, Any]:
    """Measure in this process; see `in_fresh_process`."""
    module = PARTS[case.part]
    first = module.build(module.small(case), device)[path]
    first.step(first.prepare())
    found = module.build(case, device)[path]
    found.module.zero_grad(set_to_none=True)
    gc.collect()
    if device != "cpu":
        return _peak_on_cuda(found, case.limit_gib)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages back to the system, so that the level is low
    with contextlib.suppress(OSError):
        File("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("self", "VmRSS")
    found.step(found.prepare())
    high = _resident("self", "VmHWM")
    return {"peak": high - before, "process_peak": high, "exceeded": False}


def _peak_on_cuda(found: Any, limit_gib: float) -> dict[str, Any]:
    if limit_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        found.step(found.prepare())
        synchronise("cuda")
    except torch.OutOfMemoryError:
        return {"peak": None, "process_peak": None, "exceeded": True}
    high = torch.cuda.max_memory_allocated()
    return {"peak": high - before, "process_peak": high, "exceeded": False}


def _resident(process: int | str, field: str) -> int:
    """Return a line of /proc/PROCESS/status in bytes; 0 where the process has just ended."""
    try:
        lines = File(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _main() -> None:
    part, name, path, device, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = next(c for c in all_cases(quick == "1") if (c.part, c.name) == (part, name))
    sys.stdout.write(json.dumps(peak(case, path, device)) + "\n")


if __name__ == "__main__":
    _main()
