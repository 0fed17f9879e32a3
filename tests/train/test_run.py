"""A stage that is prolonged, ended early, or started from weights of elsewhere."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import latent_sft.train.loop as loop
import latent_sft.train.run as run
from latent_sft import cli
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config, to_yaml
from latent_sft.errors import ArtefactError, ConfigError, Interrupted
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import SECTIONS
from latent_sft.runs import Step
from latent_sft.train.interruption import last_checkpoint
from latent_sft.train.run import train_stage


def logged(folder: Path, tag: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[tag] for line in lines if tag in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def stop_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    original = loop.TrainingLoop._prepared

    def begin(self, batches):
        self.signals.requested |= self.state.global_step == step - 1
        return original(self, batches)

    patch.setattr(loop.TrainingLoop, "_prepared", begin)


# -------------------------------------------------------------------------------------------------- prolonged


def test_a_prolonged_stage_has_the_weights_of_one_that_was_as_long_from_the_start(tiny_config, tmp_path, caplog):
    """With a constant learning rate; the order of the data, the optimizer and the best checkpoint go on."""
    settings = ("cot.schedule=constant", "cot.warmup_ratio=0", "cot.eval_every=2")
    straight = train_stage(tiny_config(*settings, "cot.max_steps=8", f"run_dir={tmp_path / 'straight'}"), "cot")
    train_stage(tiny_config(*settings), "cot")
    with caplog.at_level(logging.INFO, logger="latent_sft"):
        step = train_stage(tiny_config(*settings, "cot.max_steps=8"), "cot")
    assert "cot: continues from step 4 of 4, now to step 8" in caplog.text
    assert logged(step.directory, "train/loss") == logged(straight.directory, "train/loss")
    assert same(step.directory, straight.directory)
    assert step.results()["steps"] == 8
    assert [part["step"] for part in step.results()["history"]] == [4]
    assert step.fingerprint == straight.fingerprint and step.outcome != straight.outcome == straight.fingerprint


def test_the_learning_rate_of_a_prolonged_stage_is_that_of_the_longer_schedule(tiny_config, tmp_path):
    straight = train_stage(tiny_config("cot.max_steps=8", f"run_dir={tmp_path / 'straight'}"), "cot")
    seen = []

    original = loop.TrainingLoop._prepared

    def look(self, batches):
        seen.append((self.state.global_step, self.optimizer.param_groups[0]["lr"]))
        return original(self, batches)

    train_stage(tiny_config("cot.max_steps=4"), "cot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_prepared", look)
        step = train_stage(tiny_config("cot.epochs=3", "cot.max_steps=8"), "cot")
    expected = logged(straight.directory, "train/learning_rate")
    assert dict(seen) == {n: expected[n + 1] for n in range(4, 8)}
    assert logged(step.directory, "train/learning_rate")[8] == expected[8]


def test_the_best_checkpoint_of_before_stays_the_model_where_nothing_better_comes(tiny_config, monkeypatch):
    accuracies = iter([0.5, 0.25, 0.25, 0.0])
    monkeypatch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
    first = train_stage(tiny_config("cot.save_every=3"), "cot")  # the last step is saved anyway
    before = weights(first.directory)
    step = train_stage(tiny_config("cot.save_every=3", "cot.max_steps=8"), "cot")
    assert step.results()["best_step"] == 2
    assert all(torch.equal(before[name], value) for name, value in weights(step.directory).items())
    assert sorted(p.name for p in step.directory.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]


def test_what_was_made_from_the_shorter_stage_is_not_taken_for_made_from_the_longer(tiny_config):
    train_stage(tiny_config(), "cot")
    train_stage(tiny_config("stage1.init=cot"), "stage1-encoder")
    longer = tiny_config("stage1.init=cot", "cot.max_steps=5")
    with pytest.raises(ArtefactError, match="cot: not finished yet"):
        train_stage(tiny_config("coconut.init=cot", "cot.max_steps=5"), "coconut")
    train_stage(longer, "cot")
    with pytest.raises(ArtefactError, match=r"stage1-encoder: made by another experiment \(source was"):
        train_stage(longer, "stage1-encoder")


def test_a_stage_whose_state_was_not_kept_says_what_can_be_done(tiny_config):
    step = train_stage(tiny_config("cot.keep_checkpoint=false"), "cot")
    assert not list(step.directory.glob("checkpoint-*"))
    with pytest.raises(ArtefactError, match=r"finished after 4 steps.*cot.keep_checkpoint.*cot.start_from="):
        train_stage(tiny_config("cot.max_steps=8"), "cot")


def test_a_stage_cannot_become_shorter_than_it_is(tiny_config):
    train_stage(tiny_config(), "cot")
    with pytest.raises(ArtefactError, match=r"cot: trained for 4 steps already, more than the 3 of cot.max_steps"):
        train_stage(tiny_config("cot.max_steps=3"), "cot")
    with pytest.raises(ArtefactError, match=r"made by another experiment \(train.learning_rate was"):
        train_stage(tiny_config("cot.max_steps=8", "cot.learning_rate=1"), "cot")


# -------------------------------------------------------------------------------------------------- ended early


def file_of(config: Config, path: Path) -> str:
    path.write_text(to_yaml(config))
    return str(path)


def test_a_stopped_stage_is_ended_and_kept(tiny_config, tmp_path, monkeypatch, capsys):
    """The best checkpoint so far becomes the model; training skips the stage, and the next one starts from it."""
    config = tiny_config("cot.max_steps=9", "cot.eval_every=2", "stage1.init=cot")
    accuracies = iter([0.5, 0.25])
    path = file_of(config, tmp_path / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
        stop_in_step(patch, 5)
        assert cli.main(["train", "cot", path]) == 75
    folder = Path(config.directory) / "cot"
    best = load_file(folder / "checkpoint-2" / "model.safetensors")
    capsys.readouterr()
    assert cli.main(["finish", "cot", path]) == 0
    step = Workspace(config).step("cot")
    found = step.results()
    assert (found["steps"], found["best_step"], found["ended_early"]) == (5, 2, True)
    assert found["history"] == [{"step": 5, "of": 9, "fingerprint": step.fingerprint}]
    assert found["examples_seen"] == 40
    assert all(torch.equal(best[f"lm.{name}"], value) for name, value in weights(folder).items())
    assert train_stage(config, "cot").outcome != step.fingerprint
    assert Workspace(config).step("stage1-encoder").inputs["source"] == step.outcome
    train_stage(config, "stage1-encoder")


def test_an_ended_stage_can_go_on_after_all(tiny_config, tmp_path):
    config = tiny_config("cot.max_steps=9")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(Interrupted):
            train_stage(config, "cot")
    run.finish_stage(config, "cot")
    step = train_stage(tiny_config("cot.max_steps=6"), "cot")
    assert step.results()["steps"] == 6 and "ended_early" not in step.results()
    assert [(part["step"], part["of"]) for part in step.results()["history"]] == [(3, 9)]


def test_there_must_be_something_to_finish(tiny_config, tmp_path, capsys):
    path = file_of(tiny_config(), tmp_path / "config.yaml")
    assert cli.main(["finish", "cot", path]) == 2
    assert "cot: no complete checkpoint" in capsys.readouterr().err
    train_stage(tiny_config(), "cot")
    assert last_checkpoint(Path(tiny_config().directory) / "cot")
    assert cli.main(["finish", "cot", path]) == 0


# -------------------------------------------------------------------------------------------------- warm start


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """A run with an encoder phase and a kava stage, to start from."""
    folder = tmp_path_factory.mktemp("other") / "run"
    config = load_config(None, [*TINY, f"run_dir={folder}", "kava.init=base", "kava.projection=true", "seed=7"])
    train_stage(config, "stage1-encoder")
    train_stage(config, "kava")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("stage", "source", "folders"),
    [
        ("cot", "kava", {".": "."}),
        ("kava", "kava", {".": "."}),  # its projection too
        ("kava", "stage1-encoder", {".": "decoder"}),
        ("stage1-union", "stage1-encoder", {"encoder": "encoder", "decoder": "decoder", ".": "."}),
        ("stage1-encoder", "kava", {"encoder": ".", "decoder": "."}),
    ],
)
def test_a_stage_starts_from_weights_of_another_run(tiny_config, other_run, stage, source, folders):
    """With a learning rate that moves nothing the model is what it started from."""
    settings = ("max_steps=1", "learning_rate=1e-30", f"start_from={other_run / source}")
    step = train_stage(tiny_config("kava.projection=true", *(f"{SECTIONS[stage]}.{s}" for s in settings)), stage)
    for after, before in folders.items():
        found, expected = tensors(step.final / after), tensors(other_run / source / "final" / before)
        shared = found.keys() & expected.keys()
        assert {"model.embed_tokens.weight", "marker"} & shared
        assert not [name for name in shared if not torch.equal(found[name], expected[name])]


def test_labels_come_from_the_encoder_wherever_the_student_starts(tiny_config, other_run):
    """Stage 2 with weights of another run still learns the latents of its own run's last phase."""
    plain = ("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
    train_stage(tiny_config(*plain), "stage1-union")
    found = []
    for start in ((), (f"stage2.start_from={other_run / 'kava'}",)):
        config = tiny_config(*plain, *start)
        folder = Path(config.directory) / "labels"
        make_labels(config)
        found.append([path.read_bytes() for path in sorted(folder.rglob("labels-*.arrow"))])
        shutil.rmtree(folder)
    assert found[0] and found[0] == found[1]


def test_where_weights_of_another_run_lie_does_not_matter(tiny_config, other_run, tmp_path):
    def step_of(folder: Path) -> Step:
        return Workspace(tiny_config(f"stage2.start_from={folder}", "stage1.init=cot")).step("stage2")

    moved = shutil.copytree(other_run / "kava" / "final", tmp_path / "moved")
    assert step_of(moved).fingerprint == step_of(other_run / "kava").fingerprint
    assert step_of(moved).fingerprint != step_of(other_run / "stage1-encoder").fingerprint
    assert step_of(moved).inputs["store"] == Workspace(tiny_config("stage1.init=cot")).step("stage1-union").fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cot.start_from=nowhere"], r"cot.start_from: no model in 'nowhere', expected the folder of a finished stage"),
        (["model.tiny.num_layers=1"], r"another architecture than `model` \(num_hidden_layers 2 instead of 1\)"),
        (["data.synthetic.task=arithmetic", "model.tiny.vocab_size=4096"], r"another architecture .*vocab_size"),
        (["model.tiny.tokenizer=digits"], r"the tokenizer in .* has other ids|another architecture .*vocab_size"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny_config, other_run, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_stage(tiny_config(f"cot.start_from={other_run / 'kava'}", *settings), "cot")


def test_a_shared_backbone_starts_from_one_model(tiny_config, other_run):
    shared = ("stage1.share_backbone=true", "model.lora.rank=2")
    with pytest.raises(ConfigError, match=r"stage1.union.start_from: got 'x', expected empty, or"):
        tiny_config(*shared, "stage1.union.start_from=x")
    two = tiny_config(*shared, f"stage1.encoder.start_from={other_run / 'stage1-encoder'}")
    with pytest.raises(ConfigError, match=r"stage1.encoder.start_from: .* holds an encoder and a decoder"):
        train_stage(two, "stage1-encoder")


def test_a_stage_with_weights_of_its_own_needs_no_cot_stage(tiny_config):
    settings = ("cot.enabled=false", "coconut.init=cot", "coconut.train.enabled=true")
    assert tiny_config(*settings, "coconut.train.start_from=x")
    with pytest.raises(ConfigError, match=r"coconut\.init: .*cot.enabled=true"):
        tiny_config(*settings)
