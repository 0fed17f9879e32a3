"""`python -m eval.speed`: the fast path against the plain path, as tables, JSON and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils import benchmark
from tqdm import tqdm

import latent_sft
from eval.speed import cases, measure, tables

ONLY = {name: (name,) for name in ("stage1", "stage2", "labels", "decode", "kava", "shared")}
ONLY |= {"stage1": ("stage1", "decoder"), "decode": ("decode", "step", "quickstart")}
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where the paths do not agree."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__)
    parser.add_argument("--only", default="stage1,stage2,labels,decode", help=f"some of {','.join(ONLY)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for JSON and plots")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; all cores by default")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each path")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory processes out")
    parser.add_argument("--results", type=Path, help="show the speed.json of an earlier run instead of measuring")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="put tables and plots into this document")
    options = parser.parse_args(argv)
    docs = options.write_docs
    if unknown := set(options.only.split(",")) - set(ONLY):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {','.join(ONLY)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if docs and not {BEGIN, END} <= set(docs.read_text().splitlines()):
        parser.error(f"--write-docs {docs}: the tables belong between the lines {BEGIN!r} and {END!r}")
    if options.results:
        results = json.loads(options.results.read_text())
    else:
        command = shlex.join(["python", "-m", "eval.speed", *(sys.argv[1:] if argv is None else argv)])
        results = _run(options, command)
    shown, names = tables.to_markdown(results), tables.save_plots(results, options.out)
    sys.stdout.write("\n\n".join([*shown, results["machine"], f"{options.out}: speed.json and plots."]) + "\n")
    if docs:
        tables.save_plots(results, docs.parent / "images")
        images = [f"![{name.replace('_', ' ')}](images/{name}.png)" for name in names]
        text = "\n\n".join([BEGIN, f"`{results['command']}`", results["machine"], *shown[:1], *images, *shown[1:], END])
        before, rest = docs.read_text().split(BEGIN, 1)
        docs.write_text(before + text + rest.split(END, 1)[1])
    return 0 if all(map(measure.is_same, results["differences"])) else 1


def _run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Compare, then time, then measure memory; return everything as plain data."""
    torch.set_num_threads(options.threads)
    device, parts = options.device, [part for name in options.only.split(",") for part in ONLY[name]]
    chosen = [case for case in cases.all_cases(options.quick) if case.part in parts]
    checked, timed = measure.checked(chosen), [case for case in chosen if case.timed]
    remembered = [case for case in chosen if case.memory and options.memory]
    square = torch.randn(2, *[512 if options.quick else 2048] * 2, device=device)
    timer = benchmark.Timer("x[0] @ x[1]", globals={"x": square}, num_threads=options.threads)
    rate = 2.0 * square.shape[-1] ** 3 / timer.adaptive_autorange(max_run_time=5).median
    results = {"command": command, "machine": _machine(options, rate), "matmul_rate": rate}
    results |= {"differences": [], "cases": [], "memory": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for part, some in (("differences", checked), ("cases", timed), ("memory", remembered)):
        for case in tqdm(some, desc=part):
            if part == "differences":
                found = measure.differences(case, device)
            elif part == "cases":
                found = measure.times(case, device, options.repeats)
            else:
                how = device, options.threads, options.quick
                paths = {path: measure.memory_in_fresh_process(case, path, *how) for path in case.memory}
                found = {key: getattr(case, key) for key in ("part", "name", "cot", "limit_gib")} | {"paths": paths}
            results[part].append(found)
            # at once: a run is long, and a machine may run out of memory
            (options.out / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    return json.loads((options.out / "speed.json").read_text())


def _machine(options: argparse.Namespace, rate: float) -> str:
    name = platform.processor() or platform.machine()
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return (
        f"{name}, {os.cpu_count()} cores, {options.threads} threads, {options.device}, float32; load "
        f"{os.getloadavg()[0]:.1f} at the start; matrix products {rate / 1e9:.0f} GFLOP/s; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, latent_sft "
        f"{latent_sft.__version__}."
    )


if __name__ == "__main__":
    sys.exit(main())
