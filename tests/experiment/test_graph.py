"""The graph of an experiment: what needs what, and what is one node for two experiments."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import NAMED

from latent_sft.config.load import load_config
from latent_sft.evaluation.results import Job
from latent_sft.experiment.graph import dependents, graph_of, together
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.methods import STAGES
from latent_sft.runs import fingerprint

EVERYTHING = [f"{stage.section}.enabled=true" for stage in STAGES.values()]
ALIKE = ("base", "data", "no-cot", "cot", "stage1-union", "label", "stage2", "eval no-cot", "eval cot")


def shared(*settings: str) -> list[str]:
    """Return which nodes of an experiment are also those of one with other settings."""
    configs = [load_config(None, [*NAMED, *more]) for more in ((), settings)]
    jobs = [Job(name, config) for name, config in zip("ab", configs, strict=True)]
    return [places[0][1].name for places in together(jobs).values() if len(places) == 2]


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ("run_dir=elsewhere", []),
        ("name=other", []),
        ("report_to=[wandb]", []),
        ("cot.log_every=7", []),
        ("eval.batch_size=3", []),
        ("seed=1", ALIKE),
        ("data.synthetic.modulus=7", ALIKE),
        ("model.dtype=bfloat16", ALIKE),
        ("prompt.think=<t>", ALIKE),
        ("cot.max_steps=7", ["cot", "eval cot"]),
        ("cot.enabled=false", ["cot", "eval cot"]),
        ("no_cot.learning_rate=0.5", ["no-cot", "eval no-cot"]),
        ("stage2.max_steps=7", ["stage2"]),
        ("labels.shard_size=7", ["label"]),
        ("latent.rate=4", ["data", "stage1-union", "label", "stage2", "eval no-cot", "eval cot"]),
        ("eval.limit=7", ["eval no-cot", "eval cot"]),
        ("stage1.init=cot", ["stage1-union", "label", "stage2"]),
        ("stage2.start_from=elsewhere", ["stage2"]),
    ],
)
def test_nodes_with_equal_fingerprints_are_one_and_others_are_not(setting: str, gone: list[str]) -> None:
    assert [name for name in shared(setting) if name in ALIKE] == [name for name in ALIKE if name not in gone]


def test_a_node_needs_earlier_ones_only() -> None:
    """So that no cycle is possible, and an order is always there; and no source is left out for being later."""
    experiment = Experiment(load_config(None, EVERYTHING))
    nodes = graph_of(experiment)
    order = list(nodes)
    for place, node in enumerate(nodes.values()):
        assert all(order.index(need) < place for need in node.needs), node.name
    for name in STAGES:
        source = experiment.source_name(name)
        assert source is None or source in nodes[name].needs
    assert [name for name in nodes if name.startswith("eval ")] == [
        f"eval {model}" for model in experiment.config.models()
    ]


def test_what_cannot_be_made_without_another() -> None:
    nodes = graph_of(Experiment(load_config(None, [*NAMED, "stage1.init=cot"])))
    assert dependents(nodes, "stage2") == ["eval latent-sft", "report", "export"]
    assert dependents(nodes, "no-cot") == ["eval no-cot", "report"]
    assert set(nodes) - set(dependents(nodes, "cot")) == {"base", "data", "no-cot", "cot", "eval no-cot"}


def test_weights_that_are_given_need_no_stage(tmp_path: Path) -> None:
    nodes = graph_of(Experiment(load_config(None, [*NAMED, f"stage2.start_from={tmp_path}"])))
    assert nodes["stage2"].needs == ("data", "label")


def test_every_enabled_step_is_there_once_and_its_status_is_that_of_its_manifests(tiny_config) -> None:
    config = tiny_config()
    opened, planned = graph_of(Workspace(config)), graph_of(Experiment(config))
    assert list(opened) == list(planned)
    statuses = {name: node.status(Path(config.directory)) for name, node in planned.items()}
    assert statuses.pop("base") == "finished"  # opening an experiment makes it
    assert set(statuses.values()) == {"to do"}
    # fingerprints of an opened experiment tell the same apart, by content
    assert len({fingerprint(n.name, n.inputs()) for n in opened.values() if n.inputs}) == len(opened) - 2
