"""A whole experiment in one command: its graph is walked, finished steps are skipped, a summary stands at the end."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from latent_sft.config.experiment import Config
from latent_sft.errors import STOPPED, ConfigError, Interrupted, LatentSFTError, TrainingError
from latent_sft.evaluation.tables import result_table
from latent_sft.experiment.graph import Node, dependents, graph_of
from latent_sft.experiment.workspace import Workspace
from latent_sft.launcher import bound_environ, build_command, exit_status
from latent_sft.methods import STAGES
from latent_sft.runs import CLAIM, holder, lock, read_json, write_json

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2  # seconds


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
    left, failed, waited = list(nodes), list[Exception](), set[str]()
    shown = {name: f"[{number}/{len(nodes)}] {name}" for number, name in enumerate(nodes, start=1)}
    with _Beside(work) as beside:
        while left:
            ready = [name for name in left if name != beside.name and not set(nodes[name].needs) & set(left)]
            if beside.has_ended():
                name, make, claim = beside.name, beside.end, contextlib.nullcontext()
            elif (found := _claimed(ready, nodes, work)) is not None:
                name, claim = found
                make = partial(nodes[name].make, work)
                log.info("%s", shown[name])
                if beside.takes(nodes, name):
                    beside.start(name, claim)
                    continue
            else:
                for name in set(ready) - waited:
                    log.info("%s: waits for %s, which makes it", shown[name], holder(_claim_of(nodes[name], work)))
                waited |= set(ready)
                time.sleep(LOOK_EVERY)
                continue
            with claim:
                error = _failure(make)
            lost = [name]
            if error is not None:
                failed.append(error)
                lost += dependents(nodes, name)
                log.error("%s failed, and so %s left out: %s", name, ", ".join(lost[1:]) or "nothing else is", error)
            left = [name for name in left if name not in lost]
            made()
    if failed:
        raise failed[0]


def _claimed(ready: Iterable[str], nodes: Mapping[str, Node], work: Workspace) -> tuple[str, Any] | None:
    """Return the first node that no other process is making, and the hold on it."""
    for name in ready:
        # what has no command is held by whoever opens it, what is made anew is this run's own
        shared = nodes[name].command and nodes[name].inputs
        claim = lock(_claim_of(nodes[name], work)) if shared else contextlib.nullcontext()
        if claim is not None:
            return name, claim
    return None


def _claim_of(node: Node, work: Workspace) -> Path:
    return work.directory / node.folder / CLAIM


def _failure(make: Callable[[], Any]) -> Exception | None:
    try:
        make()
    except Exception as error:
        if isinstance(error, LatentSFTError) and not isinstance(error, TrainingError):
            raise  # a mistake of the user, who has to see it now
        return error
    return None


class _Beside:
    """A stage that only evaluations wait for, in a process of its own; one at a time (`launch.concurrent_baseline`)."""

    def __init__(self, work: Workspace) -> None:
        self.work, self.name = work, ""

    @property
    def console(self) -> Path:
        """File of its output."""
        return self.work.directory / self.name / "console.log"

    def takes(self, nodes: Mapping[str, Node], name: str) -> bool:
        """Return whether a stage is to run here."""
        if self.name or name not in STAGES or not self.work.config.launch.concurrent_baseline:
            return False
        waiting = [node for node in nodes.values() if name in node.needs]
        return all(node.command[0] == "eval" for node in waiting) and not self.work.step(name).is_finished()

    def start(self, name: str, claim: Any) -> None:
        """Start a stage; it stays claimed until it has ended."""
        self.name, self.claim = name, claim
        command = build_command(name, self.work.directory / "config.yaml", [], self.work.config.launch)
        log.info("%s: trains beside the next steps; its output is in %s", name, self.console)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with open(self.console, "ab") as console:
            self.job = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=bound_environ())

    def has_ended(self) -> bool:
        """Return whether there is one, and it came to its end."""
        return bool(self.name) and self.job.poll() is not None

    def end(self) -> None:
        """Let go of it; its failure is ours."""
        name, console, self.name = self.name, self.console, ""
        self.claim.close()
        status = exit_status(self.job.wait())
        if status == STOPPED:
            raise Interrupted(f"{name}: stopped as told")
        if status != 0:
            raise TrainingError(f"{name}: ended with status {status}; its messages are in {console}.")

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *_: object) -> None:
        if self.name:
            self.job.terminate()  # the run failed or was interrupted; the stage resumes with the next one
            self.job.wait()
            self.claim.close()


def _summary(config: Config, work: Workspace, seconds: float) -> dict[str, Any]:
    split = "test" if "test" in config.eval.splits and "test" in work.data else "validation"
    summary: dict[str, Any] = {"name": config.name, "seed": config.seed, "split": split}
    for name, stages in config.models().items():
        path = work.directory / "eval" / name / f"{split}.json"
        if not path.exists():
            continue  # a split without CoTs has nothing for stage 1
        result = read_json(path)["summary"]
        trained = [work.step(stage).results() for stage in stages]
        summary[name] = {
            "accuracy": result["accuracy"],
            "accuracy_se": result["accuracy_se"],
            "num_examples": result["num_examples"],
            **({"skipped": result["skipped"]} if result.get("skipped") else {}),
            "reasoning_steps_mean": result["reasoning_steps_mean"],
            "forward_passes_mean": result["forward_passes_mean"],
            "seconds_per_problem": result["seconds_per_problem"],
            "train_seconds": round(sum(t["train_seconds"] for t in trained), 1),
            "examples_seen": sum(t["examples_seen"] for t in trained),
        }
    return {**summary, "total_seconds": round(seconds, 1)}


def _show(summary: dict[str, Any], report: Path) -> None:
    from rich.console import Console

    rows = [r for r in read_json(report.with_suffix(".json"))["results"] if r["split"] == summary["split"]]
    problems = f"{max(r['num_examples'] for r in rows):,} problems of the {summary['split']} split"
    title = f"{summary['name']}, seed {summary['seed']}, {problems}"
    columns = ("model", "accuracy %", "skipped", "reasoning steps", "train time", "examples seen")
    console = Console()
    console.print(result_table(rows).terminal(title, columns))
    console.print(f"total {summary['total_seconds'] / 60:.1f} min; report: {report}", soft_wrap=True)


def _seconds_so_far(directory: Path) -> float:
    path = directory / "seconds.json"
    return float(read_json(path)["total_seconds"]) if path.exists() else 0.0
