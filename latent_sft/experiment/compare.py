"""Run a comparison: every variant with every seed, each an experiment of its own; then one table of all.

    <run>/<variant>/seed-<n>/           the run of a variant and seed, with everything an ordinary run has
    <run>/shared/<step>-<fingerprint>/  a step that several of them have; each links to it under its ordinary name

The runs are processes, `compare.jobs` at once. Whoever comes first to a shared step makes it, the others wait for it or
do something else. A run that fails stops no other one; the table says what is missing. Told to stop, this process hands
that to its runs, which save what they have; the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config, to_yaml
from latent_sft.config.schema import CompareConfig
from latent_sft.errors import STOPPED, ArtefactError, ConfigError, Interrupted, TrainingError
from latent_sft.evaluation.report import write_comparison
from latent_sft.evaluation.results import Job
from latent_sft.experiment.graph import together
from latent_sft.launcher import bound_environ, exit_status
from latent_sft.runs import LOCK, exclusive, lock, write_atomically

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2  # seconds
_OURS = ("name", "run_dir", "seed")


class Running(NamedTuple):
    """A run in progress, and when it began."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float


def jobs_of(path: str | Path, overrides: Sequence[str] = ()) -> list[Job]:
    """Return the runs of a comparison, seed by seed, variants in the order of the file.

    Args:
        path: YAML file with `compare.variants`.
        overrides: `key=value` settings of the command line; they win over a variant's.

    Raises:
        ConfigError: a wrong setting, naming its variant.
    """
    whole = load_config(path, overrides)
    configs = {name: _variant(path, overrides, whole, name) for name in whole.compare.variants}
    return [
        Job(name, dataclasses.replace(config, seed=seed, run_dir=f"{whole.directory}/{name}/seed-{seed}"))
        for seed in whole.compare.seeds
        for name, config in configs.items()
    ]


def _variant(path: str | Path, overrides: Sequence[str], whole: Config, name: str) -> Config:
    where, settings = f"compare.variants.{name}", whole.compare.variants[name]
    for text in settings:
        key = text.partition("=")[0]
        if key in _OURS or key.split(".")[0] == "compare":
            raise ConfigError(f"{where}: {key!r} is decided by the comparison; leave it out.")
    try:
        config = load_config(path, [*settings, *overrides])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(config, name=f"{whole.name}-{name}", compare=CompareConfig())


def run_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run every variant of a comparison with every seed, and write the comparison; finished runs are skipped.

    Args:
        path: YAML file with `compare.variants`.
        overrides: `key=value` settings that win over the file and its variants.

    Returns:
        Path of `<run>/comparison.html`.

    Raises:
        ConfigError: a wrong setting of any variant, before anything runs.
        TrainingError: runs failed; the others are finished and compared.
        Interrupted: the process, or a run, was told to stop.
    """
    config = load_config(path, overrides)
    jobs = jobs_of(path, overrides)
    directory = Path(config.directory)
    write_atomically(directory / "config.yaml", to_yaml(config))
    with exclusive(directory):
        share(jobs, directory)
        # where that lock is not seen, runs could not wait for each other
        locks = config.compare.jobs == 1 or lock(directory / LOCK) is None
        failed = _run_all(jobs, config.compare.jobs if locks else 1)
    if not failed:
        return write_comparison(config, jobs)
    with contextlib.suppress(ArtefactError):  # nothing to compare yet: the failures say more
        log.info("what there is: %s", write_comparison(config, jobs))
    lines = "".join(f"\n  {job.name}: status {status}, see {job.console}" for job, status in failed)
    message = f"{len(failed)} of {len(jobs)} runs did not finish:{lines}"
    if all(status == STOPPED for _, status in failed):
        raise Interrupted(message)
    raise TrainingError(f"{message}\nThe same command runs them again.")


def share(jobs: Sequence[Job], directory: Path) -> None:
    """Give the steps that several runs have one folder each, and link to it from the runs.

    Folders are named by the fingerprint of their step, so another setting is another folder, and what was there stays.
    A finished run is left as it is; what only it has so far becomes shared where another one has the same step now.
    """
    finished = {job.name for job in jobs if job.is_finished()}
    for key, places in together(sorted(jobs, key=lambda job: job.name not in finished)).items():
        name = places[0][1].folder.replace("/", "-")
        home = directory / "shared" / f"{name}-{key}"
        for job, node in places:
            _link(job.directory / node.folder, home, wanted=len(places) > 1, finished=job.name in finished)


def _link(own: Path, home: Path, *, wanted: bool, finished: bool) -> None:
    if own.is_symlink() and not finished:
        own.unlink()  # perhaps of other settings
    if finished and wanted and own.is_dir() and not own.is_symlink() and not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        own.rename(home)  # made before another run had it too
    if not os.path.lexists(own) and (wanted or home.exists()):
        home.mkdir(parents=True, exist_ok=True)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(os.path.relpath(home, own.parent), target_is_directory=True)


def _run_all(jobs: Sequence[Job], at_once: int) -> list[tuple[Job, int]]:
    """Run what is not finished, and return the runs that failed with their exit status."""
    variants = [job.variant for job in jobs]
    # seeds share little, so a variant's are good to have side by side
    waiting = sorted((job for job in jobs if not job.is_finished()), key=lambda job: variants.index(job.variant))
    total, ended = len(waiting), 0
    if len(jobs) > total:
        log.info("%d of %d runs are finished already, skipped", len(jobs) - total, len(jobs))
    failed: list[tuple[Job, int]] = []
    running: list[Running] = []
    with _stopping(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0)))
            time.sleep(LOOK_EVERY)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                ended += 1
                status = exit_status(run.process.returncode)
                how = "finished" if status == 0 else f"FAILED with status {status}"
                minutes = (time.monotonic() - run.began) / 60
                log.info(
                    "[%d/%d] %s: %s after %.1f min (%s)", ended, total, run.job.name, how, minutes, run.job.console
                )
                if status:
                    failed.append((run.job, status))
    return failed


def _start(job: Job) -> Running:
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "summary.json").unlink(missing_ok=True)  # of other settings
    path = job.directory / "config.yaml"
    write_atomically(path, to_yaml(job.config))
    log.info("%s: starts", job.name)
    environ = {**bound_environ(), "TQDM_DISABLE": "1"}  # a bar in a file is one endless line
    with open(job.console, "ab") as console:
        # a session of its own: Ctrl-C reaches this process alone, which hands on a signal that saves
        streams = {"stdin": subprocess.DEVNULL, "stdout": console, "stderr": console}
        process = subprocess.Popen(command_of(path), **streams, env=environ, start_new_session=True)
    return Running(job, process, time.monotonic())


def command_of(path: Path) -> list[str]:
    """Return the command line of one run."""
    return [sys.executable, "-m", "latent_sft.cli", "run", str(path)]


@contextlib.contextmanager
def _stopping(running: list[Running]) -> Iterator[None]:
    """However this process is made to leave, its runs are told to save and to end, and have ended."""
    try:
        yield
    finally:
        for run in running:
            run.process.terminate()
        if running:
            log.info("stopping %s", ", ".join(run.job.name for run in running))
        for run in running:
            run.process.wait()
