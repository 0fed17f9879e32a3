"""Adapters alone: base and adapters together answer as the merged export does."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

import latent_sft
from latent_sft import cli
from latent_sft.config.load import to_yaml
from latent_sft.data.records import load_splits
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.train.run import train_stage

LORA = (
    "model.lora.rank=2",
    "stage1.encoder.enabled=false",
    "stage1.decoder.enabled=false",
    "stage2.learning_rate=3e-2",
)


def test_base_and_adapters_answer_as_the_merged_export(tiny_config, tmp_path: Path, capsys):
    config = tiny_config(*LORA)
    work = Workspace(config)
    train_stage(config, "stage1-union", work)
    make_labels(config, work)
    step = train_stage(config, "stage2", work)
    path, out = tmp_path / "lora.yaml", tmp_path / "adapter"
    path.write_text(to_yaml(config))
    for _ in range(2):  # an earlier one is replaced
        assert cli.main(["export", str(path), "--adapter", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    names = {p.name for p in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "latent_spec.json", "thinker.json"} <= names
    assert not {"model.safetensors", "optimizer.pt"} & names

    whole = latent_sft.load(export_run(config, "latent-sft", tmp_path / "whole"))
    alone = latent_sft.load(out)
    problems = [record.problem for record in load_splits(config.data).test][:6]
    for problem in problems:
        expected, found = whole.generate(problem), alone.generate(problem)
        assert (found.answer, found.num_steps) == (expected.answer, expected.num_steps)
        assert [latent.tokens for latent in found.latents] == [latent.tokens for latent in expected.latents]

    # plain PEFT finds the base by the name in the folder, and gives the weights of `final`
    base = AutoModelForCausalLM.from_pretrained(step.directory.parent / "stage1-union" / "final" / "decoder")
    merged = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    final = AutoModelForCausalLM.from_pretrained(step.final).state_dict()
    assert max((merged[name] - value).abs().max().item() for name, value in final.items()) < 1e-6


def test_what_has_no_adapters_is_refused(tiny_config, tmp_path: Path, capsys):
    path = tmp_path / "full.yaml"
    path.write_text(to_yaml(tiny_config()))
    assert cli.main(["export", str(path), "--adapter", "--out", str(tmp_path / "out")]) == 2
    assert "model.lora.rank: got 0, expected adapters (a rank >= 1) for --adapter." in capsys.readouterr().err
    assert cli.main(["export", str(path), "--adapter"]) == 2
    assert "--adapter: expected an experiment and --out DIR" in capsys.readouterr().err
