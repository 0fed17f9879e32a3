"""What is logged is what docs/metrics.md defines, and Weights & Biases gets the same scalars, one run a stage."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest

from latent_sft.errors import ConfigError
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.train.run import train_stage

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
# logged on CUDA only
ON_GPU = {"train/mfu", "train/peak_memory_gib"}
STAND_IN = """
calls = []

def init(project, name): calls.append(("init", project, name))

def log(values): calls.append(("log", {k: v for k, v in values.items() if k != "train/global_step"}))

def finish(): calls.append(("finish",))
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Stand in for the package, as far as the loop calls it; return what it was told."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("WANDB_PROJECT", "latents")
    import wandb

    yield wandb.calls
    for name in [n for n in sys.modules if n.split(".")[0] == "wandb"]:
        del sys.modules[name]


def tags_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step", "seconds")} for line in lines]


def test_what_is_logged_is_what_is_documented_and_goes_to_wandb_too(tiny_config, wandb):
    more = ("stage1.span_weight=0.5", "report_to=[wandb]")
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false", *more)
    work = Workspace(config)
    folders = [train_stage(config, "stage1-union", work).directory]
    make_labels(config, work)
    folders.append(train_stage(config, "stage2", work).directory)

    quiet = dataclasses.replace(config, report_to=())
    others = [train_stage(quiet, name, work).directory for name in ("kava", "lotus")]
    logged = {tag for folder in (*folders, *others) for line in tags_of(folder) for tag in line}
    documented = set(re.findall(r"^\| `((?:train|eval)/\w+)` \|", PAGE, re.MULTILINE))
    assert logged | ON_GPU == documented

    told = [call[0] for call in wandb]
    assert [call[1:] for call in wandb if call[0] == "init"] == [
        ("latents", "experiment stage1-union"),
        ("latents", "experiment stage2"),
    ]
    assert told.count("finish") == 2 and told[-1] == "finish"
    first = told.index("finish")
    for folder, calls in zip(folders, (wandb[:first], wandb[first:]), strict=True):
        sent = [call[1] for call in calls if call[0] == "log"]
        assert [line for line in sent if line.keys() != {"train/epoch"}] == tags_of(folder)

    summary = evaluate(config, models=["latent-sft"], splits=["validation"], work=work)["latent-sft"]["validation"]
    section = PAGE.partition("## In `eval/")[2]
    names = re.findall(r"`(\w+\*?)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))
    missing = [key for key in summary if not any(fnmatch.fnmatch(key, name) for name in names)]
    assert not missing, f"docs/metrics.md does not define {missing}"


def test_an_unknown_service_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"report_to: got \['mlflow'\], expected \[\] or \[wandb\]"):
        tiny_config("report_to=[mlflow]")


def test_a_missing_package_is_said_before_anything_is_trained(tiny_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tiny_config("report_to=[wandb]")
    with pytest.raises(ConfigError, match="wandb is not installed here"):
        train_stage(config, "cot")
    assert not (Path(config.directory) / "cot").exists()
