"""The whole experiment in one command: every enabled step in order, finished ones skipped, a summary at the end."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

from latent_sft.config.experiment import Config
from latent_sft.config.load import to_yaml
from latent_sft.errors import STOPPED, ConfigError, Interrupted, TrainingError
from latent_sft.evaluation.report import write_report
from latent_sft.evaluation.run import evaluate, evaluated_models
from latent_sft.evaluation.tables import result_table
from latent_sft.experiment.plan import exported, steps
from latent_sft.experiment.stores import store_latents
from latent_sft.experiment.workspace import Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.launcher import bound_environ, build_command, start
from latent_sft.methods import STAGES
from latent_sft.runs import exclusive, read_json, write_atomically, write_json
from latent_sft.train.run import train_stage

log = logging.getLogger(__name__)


def run_experiment(config: Config) -> dict[str, Any]:
    """Run every enabled step of an experiment and write `<run>/summary.json`.

    Args:
        config: one experiment; a comparison is run by `compare.run_comparison`.

    Returns:
        The summary: for each evaluated model `accuracy`, `num_examples`, `reasoning_steps_mean` (on test, or on
        validation where there is no test set) and `train_seconds`; `total_seconds` over all commands of this run.

    Raises:
        ConfigError: the configuration is that of a comparison.
    """
    if config.compare.variants:
        raise ConfigError(
            "compare.variants: expected none here; latent_sft.experiment.compare.run_comparison runs a comparison."
        )
    directory = Path(config.directory)
    began, before = time.monotonic(), _seconds_so_far(directory)
    work = Workspace(config)
    for split in work.data:
        _ = work.data[split]  # a bad row of the test set must not show after the training
    names = steps(config)
    readers = {stage.reads.name: reader for reader, stage in STAGES.items() if stage.reads is not None}
    with _Baseline(config, work) as baseline:
        for number, name in enumerate(names, 1):
            log.info("[%d/%d] %s", number, len(names), name)
            if name in readers:
                store_latents(work, readers[name])
            elif name == "eval":
                baseline.wait()
                evaluate(config, work=work)
            elif name == "report":
                report = write_report(directory, title=config.name)
            elif name == "export":
                for model, folder in exported(config).items():
                    export_run(config, model, directory / folder)
            elif name == "no-cot" and config.launch.concurrent_baseline:
                baseline.start()
            else:
                _train(config, name, work)
            _save_seconds(directory, before + time.monotonic() - began)
    summary = _summary(config, work, before + time.monotonic() - began)
    write_json(directory / "summary.json", summary)
    _show(summary, report)
    return summary


def _train(config: Config, name: str, work: Workspace) -> None:
    if config.launch.alone or work.step(name).is_finished():
        with exclusive(work.step(name).directory):
            train_stage(config, name, work)
        return
    path = work.directory / "config.yaml"
    write_atomically(path, to_yaml(config))
    status = start(build_command(name, path, [], config.launch))
    if status == STOPPED:
        raise Interrupted(f"{name}: stopped as told")
    if status != 0:
        raise TrainingError(
            f"{name}: the {config.launch.nproc}-process job ended with status {status}; see its messages above."
        )


class _Baseline:
    """The no-cot stage in a process of its own, beside the stages that do not wait for it."""

    def __init__(self, config: Config, work: Workspace) -> None:
        self.step, self.job = work.step("no-cot"), None
        self.console = self.step.directory / "console.log"
        self.command = build_command("no-cot", work.directory / "config.yaml", [], config.launch)

    def start(self) -> None:
        """Start it, unless it is finished."""
        if self.step.is_finished():
            log.info("no-cot: finished already, skipped (%s)", self.step.directory)
            return
        log.info("no-cot: trains beside the next stages; its output is in %s", self.console)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with open(self.console, "ab") as console:
            self.job = subprocess.Popen(self.command, stdout=console, stderr=subprocess.STDOUT, env=bound_environ())

    def wait(self) -> None:
        """Wait for its end; its failure is ours."""
        if self.job is not None and self.job.wait() != 0:
            raise TrainingError(f"no-cot: ended with status {self.job.returncode}; its messages are in {self.console}.")

    def __enter__(self) -> _Baseline:
        return self

    def __exit__(self, *_: object) -> None:
        if self.job is not None and self.job.poll() is None:
            self.job.terminate()  # the run failed or was interrupted; the stage resumes with the next one
            self.job.wait()


def _summary(config: Config, work: Workspace, seconds: float) -> dict[str, Any]:
    split = "test" if "test" in config.eval.splits and "test" in work.data else "validation"
    summary: dict[str, Any] = {"name": config.name, "seed": config.seed, "split": split}
    for name, stages in evaluated_models(work).items():
        path = work.directory / "eval" / name / f"{split}.json"
        if not path.exists():
            continue  # a split without CoTs has nothing for stage 1
        result = read_json(path)["summary"]
        trained = [stage.results() for stage in stages]
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


def _save_seconds(directory: Path, seconds: float) -> None:
    write_json(directory / "seconds.json", {"total_seconds": round(seconds, 1)})
