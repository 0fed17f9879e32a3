"""Run a comparison: its runs as processes of their own, several at once, each resumable; then one table of all.

The first variant of a seed runs before the seed's others, which take over what it has finished (`reuse`). A run that
fails stops no other one; the table says what is missing. Told to stop, this process hands that to its runs, which save
what they have; the same command goes on.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from latent_sft.config.load import load_config, to_yaml
from latent_sft.errors import STOPPED, ArtefactError, Interrupted, TrainingError
from latent_sft.evaluation.report import write_comparison
from latent_sft.experiment.reuse import reuse_steps
from latent_sft.experiment.variants import Job, jobs_of
from latent_sft.launcher import bound_environ, exit_status
from latent_sft.runs import exclusive, write_atomically

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2  # seconds


class Running(NamedTuple):
    """A run in progress, and when it began."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float


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
        failed = _run_all(jobs, config.compare.jobs)
    if not failed:
        return write_comparison(config, jobs)
    with contextlib.suppress(ArtefactError):  # nothing to compare yet: the failures say more
        log.info("what there is: %s", write_comparison(config, jobs))
    lines = "".join(f"\n  {job.name}: status {status}, see {job.console}" for job, status in failed)
    message = f"{len(failed)} of {len(jobs)} runs did not finish:{lines}"
    if all(status == STOPPED for _, status in failed):
        raise Interrupted(message)
    raise TrainingError(f"{message}\nThe same command runs them again.")


def _run_all(jobs: Sequence[Job], at_once: int) -> list[tuple[Job, int]]:
    """Run what is not finished, and return the runs that failed with their exit status."""
    waiting = [job for job in jobs if not job.is_finished()]
    total, ended = len(waiting), 0
    if len(jobs) > total:
        log.info("%d of %d runs are finished already, skipped", len(jobs) - total, len(jobs))
    failed: list[tuple[Job, int]] = []
    running: list[Running] = []
    with _stopping(running):
        while waiting or running:
            while len(running) < at_once and (job := _ready(waiting, running, jobs[0].variant)):
                waiting.remove(job)
                first = next(j for j in jobs if j.config.seed == job.config.seed)
                running.append(_start(job, None if first.variant == job.variant else first))
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


def _ready(waiting: Sequence[Job], running: Sequence[Running], first: str) -> Job | None:
    """Return the next run that need not wait for the first variant of its seed."""
    leading = {job.config.seed for job in (*waiting, *(r.job for r in running)) if job.variant == first}
    return next((job for job in waiting if job.variant == first or job.config.seed not in leading), None)


def _start(job: Job, source: Job | None) -> Running:
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "summary.json").unlink(missing_ok=True)  # of other settings
    taken = reuse_steps(source.config, job.config) if source else []
    path = job.directory / "config.yaml"
    write_atomically(path, to_yaml(job.config))
    log.info("%s: starts%s", job.name, f" with {', '.join(taken)} of {source.name}" if source and taken else "")
    environ = {**bound_environ(), "TQDM_DISABLE": "1"}  # a bar in a file is one endless line
    with open(job.console, "ab") as console:
        # a session of its own: Ctrl-C reaches this process alone, which hands on a signal that saves
        process = subprocess.Popen(
            command_of(path),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environ,
            start_new_session=True,
        )
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
