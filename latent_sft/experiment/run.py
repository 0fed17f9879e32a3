"""A whole experiment in one command: its graph is walked, finished steps are skipped, a summary stands at the end."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_sft.config.experiment import Config
from latent_sft.errors import ConfigError, LatentSFTError, TrainingError
from latent_sft.evaluation.tables import result_table
from latent_sft.experiment.graph import Node, dependents, graph_of
from latent_sft.experiment.workspace import Workspace
from latent_sft.launcher import bound_environ
from latent_sft.methods import STAGES
from latent_sft.runs import CLAIM, lock, read_json, write_json

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2  # seconds
SHOWN = (
    "accuracy", "accuracy_se", "num_examples", "skipped", "reasoning_steps_mean", "forward_passes_mean",
    "seconds_per_problem",
)  # fmt: skip


def run_experiment(config: Config) -> dict[str, Any]:
    """Run every step of an experiment and write `<run>/summary.json`.

    Args:
        config: one experiment; a comparison is run by `compare.run_comparison`.

    Returns:
        The summary: for each evaluated model `accuracy`, `num_examples`, `reasoning_steps_mean` (on test, or on
        validation where there is no test set) and `train_seconds`; `total_seconds` over all commands of this run.

    Raises:
        ConfigError: the configuration is that of a comparison.
        Exception: a step failed; what does not need it is finished.
    """
    if config.compare.variants:
        raise ConfigError("compare.variants: expected none here; experiment.compare.run_comparison runs a comparison.")
    directory = Path(config.directory)
    began, before = time.monotonic(), _seconds_so_far(directory)
    work = Workspace(config)

    def seconds() -> float:
        return before + time.monotonic() - began

    walk(graph_of(work), work, lambda: write_json(directory / "seconds.json", {"total_seconds": round(seconds(), 1)}))
    summary = _summary(config, work, seconds())
    write_json(directory / "summary.json", summary)
    _show(summary, directory / "report" / "report.html")
    return summary


def walk(nodes: Mapping[str, Node], work: Workspace, made: Callable[[], None] = lambda: None) -> None:
    """Make every node after those it needs, in order; what another process is making is waited for, others go first.

    A mistake of the user ends the walk. A node that fails otherwise stops only what needs it.

    Args:
        nodes: of `graph_of`.
        work: the opened experiment.
        made: called after each node.

    Raises:
        Exception: that of the first node that failed, when all others are made.
    """
    failed, waited = list[Exception](), set[str]()
    shown = {name: f"[{number}/{len(nodes)}] {name}" for number, name in enumerate(nodes, start=1)}
    with _beside(nodes, work) as left:
        while left:
            ready = [name for name in left if not set(nodes[name].needs) & set(left)]
            claims = ((name, claim) for name in ready if (claim := _claim(nodes[name], work)) is not None)
            name, claim = next(claims, ("", None))
            if claim is None:
                for name in set(ready) - waited:
                    log.info("%s: waits for another process, which makes it", shown[name])
                waited |= set(ready)
                time.sleep(LOOK_EVERY)
                continue
            log.info("%s", shown[name])
            lost = [name]
            with claim:
                try:
                    nodes[name].make(work)
                except Exception as error:
                    if isinstance(error, LatentSFTError) and not isinstance(error, TrainingError):
                        raise  # a mistake of the user, who has to see it now
                    failed.append(error)
                    lost += dependents(nodes, name)
                    log.error("%s failed, left out: %s (%s)", name, ", ".join(lost[1:]) or "nothing else", error)
            left = [name for name in left if name not in lost]
            made()
    if failed:
        raise failed[0]


def _claim(node: Node, work: Workspace) -> Any:
    # what has no command is held by whoever opens it, and what is always made anew is this run's own
    if not node.command or node.inputs is None:
        return contextlib.nullcontext()
    return lock(work.directory / node.folder / CLAIM)


@contextlib.contextmanager
def _beside(nodes: Mapping[str, Node], work: Workspace) -> Iterator[list[str]]:
    """Yield the order of nodes; with `launch.concurrent_baseline` a process of its own begins with one that comes last.

    That is the first stage to train that only evaluations need. Should it fail there, it is made here after all.
    """
    evals = {name for name, node in nodes.items() if node.command[:1] == ("eval",)}
    lone = [n for n in nodes if n in STAGES and {m for m in nodes if n in nodes[m].needs} <= evals]
    name = next((n for n in lone if work.config.launch.concurrent_baseline and not work.step(n).is_finished()), None)
    if name is None:
        yield list(nodes)
        return
    console = work.directory / name / "console.log"
    console.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "latent_sft.cli", "train", name, str(work.directory / "config.yaml")]
    log.info("%s: trains beside the other steps; its output is in %s", name, console)
    with open(console, "ab") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=bound_environ())
    last = [name, *dependents(nodes, name)]
    try:
        yield [*(n for n in nodes if n not in last), *last]
    finally:
        job.terminate()  # where the run ends before it, it saves and resumes with the next one
        job.wait()


def _summary(config: Config, work: Workspace, seconds: float) -> dict[str, Any]:
    split = "test" if "test" in config.eval.splits and "test" in work.data else "validation"
    summary: dict[str, Any] = {"name": config.name, "seed": config.seed, "split": split}
    for name, stages in config.models().items():
        numbers = _numbers(work.directory, [name], split)
        if not numbers:
            continue  # a split without CoTs has nothing for stage 1
        trained = [work.step(stage).results() for stage in stages]
        summary[name] = numbers[name] | {
            "train_seconds": round(sum(t["train_seconds"] for t in trained), 1),
            "examples_seen": sum(t["examples_seen"] for t in trained),
        }
    sets = {split: _numbers(work.directory, list(config.models()), split) for split in config.sets()}
    return {**summary, **({"sets": sets} if sets else {}), "total_seconds": round(seconds, 1)}


def _numbers(directory: Path, models: Sequence[str], split: str) -> dict[str, Any]:
    paths = {name: directory / "eval" / name / f"{split}.json" for name in models}
    found = {name: read_json(path)["summary"] for name, path in paths.items() if path.exists()}
    return {name: {key: values[key] for key in SHOWN if key in values} for name, values in found.items()}


def _show(summary: dict[str, Any], report: Path) -> None:
    from rich.console import Console

    shown = (summary["split"], *summary.get("sets", ()))
    rows = [r for r in read_json(report.with_suffix(".json"))["results"] if r["split"] in shown]
    count = max(r["num_examples"] for r in rows if r["split"] == summary["split"])
    problems = f"{count:,} problems of the {summary['split']} split"
    title = f"{summary['name']}, seed {summary['seed']}, {problems}"
    columns = ["model", "accuracy %", "skipped", "reasoning steps", "train time", "examples seen"]
    columns += ["split", "n", "forward passes"] if "sets" in summary else []
    console = Console()
    console.print(result_table(rows).terminal(title, columns))
    console.print(f"total {summary['total_seconds'] / 60:.1f} min; report: {report}", soft_wrap=True)


def _seconds_so_far(directory: Path) -> float:
    path = directory / "seconds.json"
    return float(read_json(path)["total_seconds"]) if path.exists() else 0.0
