"""`python -m eval.speed`: the fast path against the plain path, as tables, JSON and plots."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

import latent_sft
from eval.speed import bars, estimate, floor, measure, memory, plots, tables
from eval.speed.cases import Case

ONLY = {
    "stage1": ("stage1", "decoder"),
    "stage2": ("stage2",),
    "labels": ("labels",),
    "decode": ("decode", "step", "quickstart"),
}
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where the two paths do not agree."""
    parser = _parser()
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if options.write_docs and not {BEGIN, END} <= set(options.write_docs.read_text().splitlines()):
        parser.error(f"--write-docs {options.write_docs}: the tables belong between the lines {BEGIN!r} and {END!r}")
    if options.results:
        results = json.loads(options.results.read_text())
    else:
        torch.set_num_threads(options.threads)
        command = shlex.join(["python", "-m", "eval.speed", *(sys.argv[1:] if argv is None else argv)])
        results = _run(options, command, console)
    shown = [*tables.all_tables(results), bars.table(results)]
    for table in shown:
        console.print(tables.to_rich(table))
    plots.save(results, options.out)
    console.print(f"{options.out}: speed.json and plots. {_where(results)}", soft_wrap=True)
    if options.write_docs:
        _write_docs(options.write_docs, results, shown)
        console.print(f"{options.write_docs}: tables and plots written.", soft_wrap=True)
    return 0 if all(measure.is_same(d) for d in results["differences"]) else 1


def _run(options: argparse.Namespace, command: str, console: Console) -> dict[str, Any]:
    """Compare, then time, then measure memory; return everything as plain data."""
    parts = [part for name in options.only for part in ONLY[name]]
    cases = [case for case in measure.all_cases(options.quick) if case.part in parts]
    device, rate = options.device, floor.matmul_rate(options.device, 512 if options.quick else 2048)
    checked, timed = measure.checked(cases), [case for case in cases if case.timed]
    remembered = [case for case in cases if case.memory and options.memory]

    def call(case: Case, path: str) -> float:
        return estimate.of_call(case, path, rate)

    total = sum(call(c, p) for c in checked for p in c.paths)
    total += options.repeats * sum(call(c, p) for c in timed for p in c.paths)
    total += sum(estimate.START + call(c, p) for c in remembered for p in c.memory)
    console.print(
        f"{rate / 1e9:.0f} GFLOP/s in matrix products. {len(checked)} cases to compare, {len(timed)} to time, "
        f"{sum(len(c.memory) for c in remembered)} processes for memory: about {math.ceil(total / 60)} min.",
        soft_wrap=True,
    )
    results: dict[str, Any] = {"command": command, "machine": _machine(options), "matmul_rate": rate}
    results |= {"differences": [], "cases": [], "memory": []}
    options.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=math.ceil(total), bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def done(case: Case, path: str, start: float = 0.0) -> None:
            bar.set_postfix_str(f"{case.part}: {case.name}"[:50], refresh=False)
            bar.update(start + call(case, path))

        def keep(
            part: str, found: dict[str, Any]
        ) -> None:  # at once: a run is long, and a machine may run out of memory
            results[part].append(found)
            (options.out / "speed.json").write_text(json.dumps(results, indent=1) + "\n")

        for case in checked:
            keep("differences", measure.differences(case, device))
            for path in case.paths:
                done(case, path)
        for case in timed:
            keep("cases", measure.times(case, device, options.repeats, partial(done, case)))
        for case in remembered:
            entry = {"part": case.part, "name": case.name, "cot": case.cot, "limit_gib": case.limit_gib, "paths": {}}
            for path in case.memory:
                entry["paths"][path] = memory.in_fresh_process(case, path, device, options.threads, options.quick)
                done(case, path, estimate.START)
            keep("memory", entry)
    return results


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {
        "name": name,
        "device": options.device,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "latent_sft": latent_sft.__version__,
        "dtype": "float32",
    }


def _where(results: dict[str, Any]) -> str:
    m = results["machine"]
    return (
        f"{m['name']}, {m['cores']} cores, {m['threads']} threads, {m['device']}, {m['dtype']}; load {m['load']:.1f} "
        f"at the start; matrix products {results['matmul_rate'] / 1e9:.0f} GFLOP/s; Python {m['python']}, torch "
        f"{m['torch']}, transformers {m['transformers']}, latent_sft {m['latent_sft']}."
    )


def _write_docs(path: Path, results: dict[str, Any], shown: Sequence[tables.Table]) -> None:
    """Put command, machine, bars, plots and the other tables between the two marks."""
    names = plots.save(results, path.parent / "images", ("png",))
    images = [f"![{name.replace('_', ' ')}](images/{name}.png)" for name in names]
    *others, reached = map(tables.to_markdown, shown)
    text = "\n\n".join([BEGIN, f"`{results['command']}`", _where(results), reached, *images, *others, END])
    before, rest = path.read_text().split(BEGIN, 1)
    path.write_text(before + text + rest.split(END, 1)[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__)
    parser.add_argument("--only", type=_names, default=list(ONLY), help=f"some of {','.join(ONLY)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for JSON and plots")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; all cores by default")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each path")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory processes out")
    parser.add_argument("--results", type=Path, help="show the speed.json of an earlier run instead of measuring")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="put tables and plots into this document")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ONLY]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {','.join(ONLY)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
