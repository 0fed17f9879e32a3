"""What is logged is what docs/metrics.md defines, and trackers get the same scalars, one run a stage."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

import latent_sft.train.loop as loop
from latent_sft.config.load import to_yaml
from latent_sft.config.schema import TRACKERS
from latent_sft.errors import ConfigError, Interrupted
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.train.run import train_stage

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
# logged on CUDA only
ON_GPU = {"train/mfu", "train/peak_memory_gib"}
STAND_IN = """
calls = []

class config:
    def update(values, allow_val_change): calls.append(("config", values))

class Run:
    def __init__(self, id): self.id = id
    def log(self, values, step): calls.append(("log", step, values))
    def finish(self): calls.append(("finish",))

def init(project, name, id, resume):
    calls.append(("init", project, name, id, resume))
    return Run(id or f"run{len(calls)}")
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
        ("latents", "experiment stage1-union", None, "allow"),
        ("latents", "experiment stage2", None, "allow"),
    ]
    [settings, _] = [call[1] for call in wandb if call[0] == "config"]
    assert settings["stage1.span_weight"] == "0.5" and settings["seed"] == "0"
    assert told.count("finish") == 2 and told[-1] == "finish"
    first = told.index("finish")
    for folder, calls in zip(folders, (wandb[:first], wandb[first:]), strict=True):
        assert [call[2] for call in calls if call[0] == "log"] == tags_of(folder)

    summary = evaluate(config, models=["latent-sft"], splits=["validation"], work=work)["latent-sft"]["validation"]
    section = PAGE.partition("## In `eval/")[2]
    names = re.findall(r"`(\w+\*?)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE)))
    missing = [key for key in summary if not any(fnmatch.fnmatch(key, name) for name in names)]
    assert not missing, f"docs/metrics.md does not define {missing}"


def test_an_interrupted_stage_goes_on_with_its_run(tiny_config, wandb, monkeypatch):
    config = tiny_config("cot.save_every=1", "report_to=[wandb]")
    original = loop.TrainingLoop._prepared

    def stop_after_two(self, batches):
        self.signals.requested |= self.state.global_step == 1
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_prepared", stop_after_two)
        with pytest.raises(Interrupted):
            train_stage(config, "cot")
    train_stage(config, "cot")
    first, second = [call for call in wandb if call[0] == "init"]
    assert first[3] is None and second[3] == "run1"
    assert sorted({call[1] for call in wandb if call[0] == "log"}) == [1, 2, 3, 4]


def test_a_tracker_that_cannot_begin_is_said_before_the_first_step(tiny_config, wandb, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no login\nmore lines")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    message = r"report_to: wandb could not begin a run \(no login\)\. Log in, or choose its server or offline mode"
    with pytest.raises(ConfigError, match=message):
        train_stage(tiny_config("report_to=[wandb]"), "cot")


def test_a_tracker_that_fails_later_does_not_end_training(tiny_config, wandb, monkeypatch, caplog):
    def fail(self, values, step):
        raise ConnectionError("https://user:secret@server is gone")

    monkeypatch.setattr(sys.modules["wandb"].Run, "log", fail)
    step = train_stage(tiny_config("report_to=[wandb]"), "cot")
    assert step.results()["steps"] == 4 and len(tags_of(step.directory)) == 6  # four steps, two evaluations
    assert caplog.text.count("wandb failed (ConnectionError) and gets nothing more") == 1
    assert "secret" not in caplog.text


TRACKERS_TO_TRY = {  # package, what it needs to work without a network, and the code that reads a run back
    "mlflow": (
        {"MLFLOW_TRACKING_URI": "sqlite:///runs.db"},
        """
import mlflow
client = mlflow.MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("latent_sft").experiment_id])
steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
found = {"name": run.info.run_name, "seed": run.data.params["seed"], "steps": steps}
""",
    ),
    "trackio": (
        {"TRACKIO_DIR": "trackio"},
        """
import trackio
[run] = trackio.Api().runs("latent_sft")
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("latent_sft", run.name)
steps = [point["step"] for point in logs if "train/loss" in point]
found = {"name": run.name.rsplit(" ", 1)[0], "seed": run.config["seed"], "steps": steps}
""",
    ),
    "wandb": (
        {"WANDB_MODE": "offline"},
        """
import glob
from wandb.proto import wandb_internal_pb2 as pb

def records(data):
    # the file is a log of LevelDB: blocks of 32 KiB, pieces of (checksum, length, kind) and bytes
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield pb.Record.FromString(record)
            record = b""

steps, ids, settings = [], set(), {}
for path in sorted(glob.glob("wandb/offline-run-*/*.wandb")):
    for record in records(open(path, "rb").read()):
        if record.run.run_id:
            ids.add(record.run.run_id)
            name = record.run.display_name
        settings |= {item.key: item.value_json for item in record.config.update}
        keys = {"/".join(item.nested_key) or item.key for item in record.history.item}
        steps += [record.history.step.num] if "train/loss" in keys else []
assert len(ids) == 1, ids
found = {"name": name, "seed": json.loads(settings["seed"]), "steps": steps}
""",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS_TO_TRY)
def test_the_real_trackers_get_one_run_without_a_network(tiny_config, tmp_path, name):
    """Stopped after two steps and started again; `make test-slow` installs the packages."""
    given, read = TRACKERS_TO_TRY[name]
    token = "canary-0123456789abcdef"
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_config(f"report_to=[{name}]", "cot.save_every=1")))
    environ = {**os.environ, **given, "HF_TOKEN": token, "WANDB_API_KEY": token, "WANDB_SILENT": "true"}
    train = [sys.executable, "-c", STOPPED_AFTER_TWO, str(path)]
    for words, status in ((train, 75), ([sys.executable, "-m", "latent_sft.cli", "train", "cot", str(path)], 0)):
        run = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert run.returncode == status, run.stderr[-3000:]
        assert token not in run.stdout + run.stderr
    code = f"import json\n{read}\nprint(json.dumps(found))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    found = json.loads(shown.stdout.splitlines()[-1])
    assert found == {"name": "experiment cot", "seed": "0", "steps": [1, 2, 3, 4]}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]


STOPPED_AFTER_TWO = """
import sys
import latent_sft.train.loop as loop
from latent_sft import cli
original = loop.TrainingLoop._prepared
def stop(self, batches):
    self.signals.requested |= self.state.global_step == 1
    return original(self, batches)
loop.TrainingLoop._prepared = stop
sys.exit(cli.main(["train", "cot", sys.argv[1]]))
"""


def test_the_known_trackers_are_those_of_accelerate(tiny_config):
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    with pytest.raises(ConfigError, match=r"report_to: got \['mlfow'\], expected some of aim, .* mlflow,"):
        tiny_config("report_to=[mlfow]")


def test_a_missing_package_is_said_before_anything_is_trained(tiny_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tiny_config("report_to=[wandb]")
    with pytest.raises(ConfigError, match="wandb is not installed here"):
        train_stage(config, "cot")
    assert not (Path(config.directory) / "cot").exists()
