"""Batches made with the model under training are the same however a step is cut, and wherever it was resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from train.own_latents import CALLS, with_own_latents
from train.zero_job import killed_at

from latent_sft.config.load import load_config
from latent_sft.errors import TrainingError
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.inference.noise import Sampling
from latent_sft.inference.solve import Policy, Thinker
from latent_sft.method.losses import StepOutput
from latent_sft.models.load import load_lm
from latent_sft.models.stage2 import Stage2Model
from latent_sft.train.guards import check_terms
from latent_sft.train.run import train_stage

SHORT = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false", "stage2.max_steps=5", "stage2.save_every=2"]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A run with stage 1 and labels."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    config = load_config(None, [*TINY, *SHORT, f"run_dir={folder}"])
    train_stage(config, "stage1-union")
    make_labels(config)
    return folder


def test_a_cut_or_resumed_run_thinks_the_same_latents(tiny_config, tmp_path, labelled):
    cuts = {"plain": (8, 1), "whole": (8, 1), "cut": (2, 4), "killed": (2, 4)}
    folders = {}
    for name, (size, accumulation) in cuts.items():
        shutil.copytree(labelled, tmp_path / name)
        settings = [f"stage2.micro_batch_size={size}", f"stage2.gradient_accumulation_steps={accumulation}"]
        config = tiny_config(*SHORT, *settings, f"run_dir={tmp_path / name}")
        if name == "plain":
            folders[name] = train_stage(config, "stage2").directory
            continue
        with with_own_latents():
            if name == "killed":
                killed_at(3, config, "stage2")
            folders[name] = train_stage(config, "stage2").directory
            if name == "cut":
                assert [step for step, _ in CALLS] == [step for step in range(5) for _ in range(4)]
                assert all(len(ids) == 2 for _, ids in CALLS)
    found = {name: losses(folder) for name, folder in folders.items()}
    assert len(found["whole"]) == 5
    assert found["cut"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["killed"] == found["cut"]
    assert max(abs(a - b) for a, b in zip(found["plain"], found["whole"], strict=True)) > 1e-3
    one, other = (load_file(folders[name] / "final" / "model.safetensors") for name in ("cut", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_row_draws_does_not_depend_on_its_batch(tiny_config):
    work = Workspace(tiny_config())
    setup = work.setup("cot")
    lm = load_lm(setup.single, setup.model)
    rows = {row["id"]: row["prompt"] for row in work.data["train"].select(range(6))}

    def sampled(prompts, step=3, batch_size=4):
        policy = Policy(module=lm, thinker=Thinker("explicit", lm), spec=work.spec, seed=1, step=step)
        options = {"max_cot_tokens": 6, "sampling": Sampling(temperature=1.0), "batch_size": batch_size}
        found = policy.decode(prompts, **options)
        return {row_id: (decoded.thought_ids, decoded.answer_ids) for row_id, decoded in found.items()}

    together = sampled(rows)
    assert together.keys() == rows.keys()
    assert together == {k: v for row_id, prompt in rows.items() for k, v in sampled({row_id: prompt}).items()}
    assert together == sampled(dict(reversed(rows.items())), batch_size=2)
    assert together != sampled(rows, step=4)


def test_terms_go_by_their_names():
    counts = ["count_ce", "count_kl", "count_slots"]
    check_terms(["kl", "ce"], {"ce": 1.0, "kl": 1.0}, counts)
    check_terms(["ce"], {"ce": 1.0, "kl": 0.0}, counts)
    for returned, weights in (
        (["ce"], {"ce": 1, "kl": 1}),
        (["ce", "kl"], {"ce": 1}),
        (["ce", "x"], {"ce": 1, "x": 1}),
    ):
        with pytest.raises(TrainingError, match=r"returned the loss terms \['ce'.*`Stage.terms`"):
            check_terms(returned, weights, counts)


def test_a_model_that_leaves_a_term_out_is_told(tiny_config, tmp_path, labelled, monkeypatch):
    shutil.copytree(labelled, tmp_path / "run", dirs_exist_ok=True)
    original = Stage2Model.forward

    def forward(self, **batch):
        out = original(self, **batch)
        return StepOutput({"ce": out.loss_sums["ce"]}, {})

    monkeypatch.setattr(Stage2Model, "forward", forward)
    with pytest.raises(TrainingError, match=r"\['ce'\] and the batch has \['count_ce', 'count_kl'\]"):
        train_stage(tiny_config(*SHORT), "stage2")
