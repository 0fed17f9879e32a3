"""The optimizer's groups and rates are those of transformers; half precision scales, skips and resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from train.zero_job import killed_at
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from latent_sft.config.training import TrainConfig
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import STAGES
from latent_sft.train.loop import learning_rate, make_optimizer
from latent_sft.train.run import train_stage


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"schedule": "linear"}, {"name": "linear"}),
        ({"schedule": "constant"}, {"name": "constant_with_warmup"}),
        ({"schedule": "cosine"}, {"name": "cosine"}),
        (
            {"schedule": "cosine", "min_lr_ratio": 0.1},
            {"name": "cosine_with_min_lr", "scheduler_specific_kwargs": {"min_lr_rate": 0.1}},
        ),
    ],
)
@pytest.mark.parametrize(("total", "warmup"), [(7, 2), (1, 0), (40, 3), (5, 0)])
def test_rates_are_those_of_transformers(ours, theirs, total, warmup):
    train = TrainConfig(learning_rate=3e-4, warmup_ratio=warmup / total, **ours)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=3e-4)
    schedule = get_scheduler(**theirs, optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(step, total, train) == pytest.approx(schedule.get_last_lr()[0], rel=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("stage", ["stage1-encoder", "kava", "simcot-coconut"])
def test_what_decays_is_what_decays_in_transformers(tiny_config, stage):
    work = Workspace(tiny_config("coconut.init=base", "sim_cot.coconut.init=base"))
    model = STAGES[stage].model(work.setup(stage))
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    expected = {*get_parameter_names(model, [nn.LayerNorm], patterns)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    for group, decays in zip(groups, (True, False), strict=True):
        found = [id(p) for p in group["params"]]
        assert found == [id(p) for name, p in named if (name in expected) is decays] and found


def test_half_precision_resumes_with_its_scale(tiny_config, tmp_path):
    """float16 on the CPU: the scale is halved where a step overflows, and a killed run goes on with it."""
    settings = ["cot.mixed_precision=fp16", "cot.save_every=1", "cot.eval_every=4", "cot.max_steps=6"]
    losses = {}
    for name in ("whole", "killed"):
        config = tiny_config(*settings, f"run_dir={tmp_path / name}")
        if name == "killed":
            killed_at(4, config, "cot")
        folder = train_stage(config, "cot").directory
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
        scale = torch.load(folder / "checkpoint-6" / "scaler.pt", weights_only=True)
        assert scale["scale"] >= 1
    assert losses["killed"] == losses["whole"] and len(losses["whole"]) == 6


def test_a_checkpoint_of_another_number_of_processes_draws_anew(tiny_config, tmp_path):
    """Its random state is of nobody here; data order, optimizer and schedule go on."""
    settings = ["cot.save_every=1", "cot.eval_every=4"]
    whole = train_stage(tiny_config(*settings, f"run_dir={tmp_path / 'whole'}"), "cot").directory
    config = tiny_config(*settings, f"run_dir={tmp_path / 'moved'}")
    killed_at(3, config, "cot")
    checkpoint = tmp_path / "moved" / "cot" / "checkpoint-2"
    (checkpoint / "random-0.pt").rename(checkpoint / "random-7.pt")
    facts = json.loads((checkpoint / "complete.json").read_text())
    facts["files"]["random-7.pt"] = facts["files"].pop("random-0.pt")
    (checkpoint / "complete.json").write_text(json.dumps(facts))
    shutil.rmtree(tmp_path / "moved" / "cot" / "checkpoint-3", ignore_errors=True)
    moved = train_stage(config, "cot").directory
    read = [
        [json.loads(x).get("train/loss") for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, moved)
    ]
    assert read[0] == read[1]
