"""The baseline that trains beside the other stages: its failure is the run's, and it never outlives the run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from latent_sft.config.load import load_config
from latent_sft.errors import TrainingError
from latent_sft.experiment import run
from latent_sft.runs import Step


@pytest.fixture
def baseline(tmp_path, monkeypatch):
    """Return a function: Python code -> a baseline whose job runs that code."""

    def make(code: str) -> run._Baseline:
        monkeypatch.setattr(run, "build_command", lambda *_: [sys.executable, "-c", code])
        step = Step(directory=tmp_path / "no-cot", inputs={})
        return run._Baseline(load_config(None), SimpleNamespace(step=lambda _: step, directory=tmp_path))

    return make


def test_a_failing_baseline_fails_the_run_and_names_its_console(baseline):
    with baseline("print('the reason'); raise SystemExit(3)") as job:
        job.start()
        with pytest.raises(TrainingError, match=r"no-cot: ended with status 3; its messages are in .*console\.log"):
            job.wait()
    assert "the reason" in job.console.read_text()


def test_a_run_that_fails_takes_its_baseline_with_it(baseline):
    with pytest.raises(ZeroDivisionError), baseline("import time; time.sleep(60)") as job:
        job.start()
        raise ZeroDivisionError
    assert job.job.poll() is not None


def test_a_finished_baseline_is_not_started_again(baseline):
    job = baseline("raise SystemExit(3)")
    job.step.begin(seed=0)
    job.step.finish()
    job.start()
    job.wait()
    assert job.job is None
