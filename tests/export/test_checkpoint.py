"""What an export holds, what it refuses, and that it is complete or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latent_sft.config.experiment import Config
from latent_sft.errors import ArtefactError, ExportError
from latent_sft.export import checkpoint as checkpoint_module
from latent_sft.export.checkpoint import export_checkpoint, export_run, is_export
from latent_sft.method.types import LatentSpec
from latent_sft.runs import Step


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_holds_what_a_model_needs_and_nothing_else(
    checkpoint: Path, tmp_path: Path, spec: LatentSpec
) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "deep" / "out")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "generation_config.json",
        "latent_model.py",
        "latent_spec.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert LatentSpec.from_dict(json.loads((out / "latent_spec.json").read_text())) == spec
    generation = json.loads((out / "generation_config.json").read_text())
    del generation["transformers_version"]
    assert generation == {"do_sample": False, "max_new_tokens": 7, "eos_token_id": 1, "pad_token_id": 0}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_can_be_exported_again(checkpoint: Path, tmp_path: Path) -> None:
    first = export_checkpoint(checkpoint, tmp_path / "first")
    second = export_checkpoint(first, tmp_path / "second")
    code = "custom_generate/generate.py"
    assert (first / code).read_bytes() == (second / code).read_bytes()


def test_an_earlier_export_is_replaced_as_a_whole(checkpoint: Path, tmp_path: Path) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out")
    (out / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    export_checkpoint(checkpoint, out)
    assert not (out / "model-00002-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_used_and_a_strange_one_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_export(export_checkpoint(checkpoint, tmp_path / "empty"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"thesis: is there already and is not an export"):
        export_checkpoint(checkpoint, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failed_write_leaves_the_earlier_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    replace = Path.replace
    while_copying = (checkpoint_module.shutil, "copyfile", full)
    old_one_moved_aside = (Path, "replace", lambda a, b: full() if ".part" in a.name else replace(a, b))
    for target, name, failing in (while_copying, old_one_moved_aside):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            with pytest.raises(ExportError, match="No space left on device"):
                export_checkpoint(checkpoint, out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def part_index(folder: Path) -> None:
    table = {"lm_head.weight": "model.safetensors", "gone.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"source: no such folder; expected a trained checkpoint"),
        (lambda f: (f / "latent_spec.json").unlink(), r"latent_spec\.json: missing\. Only checkpoints of this package"),
        (lambda f: (f / "latent_spec.json").write_text("{"), r"latent_spec\.json: unusable"),
        (lambda f: edit_json(f / "latent_spec.json", format=99), r"latent_spec\.json: unusable .*format 99"),
        (lambda f: edit_json(f / "thinker.json", thinker="explicit"), r"does not think in latents .*'explicit'"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds LoRA adapters; expected a merged model"),
        (lambda f: edit_json(f / "config.json", vocab_size=17), r"vocab_size 17, latent_spec\.json says 16"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: missing\. Expected the folder of a finished stage"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors: damaged"),
        (part_index, r"index\.json: 'gone\.weight' is in no file"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"source: the tokenizer cannot be read"),
    ],
)
def test_a_damaged_source_is_one_clear_error(
    source: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(source)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def finished_run(checkpoint: Path, run: Path, *, finish: bool) -> Config:
    step = Step(directory=run / "stage2", inputs={})
    step.begin(seed=3)
    shutil.copytree(checkpoint, step.final)
    if finish:
        step.finish(train_seconds=1.0, train_rows=1234)
    return Config(name="demo", run_dir=str(run), seed=3)


def test_a_run_is_exported_with_its_facts(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = finished_run(checkpoint, run, finish=True)
    trained = json.loads((run / "stage2" / "manifest.json").read_text())["fingerprint"]
    (run / "eval" / "latent-sft" / "test").mkdir(parents=True)
    inputs = {"model": trained, "eval": {"sample": False, "temperature": 0.6, "top_p": 0.95}}
    (run / "eval" / "latent-sft" / "test" / "manifest.json").write_text(json.dumps({"inputs": inputs}))
    summary = {"accuracy": 0.874, "accuracy_se": 0.0123, "num_examples": 500, "reasoning_steps_mean": 11.96}
    summary["grader"] = "numeric"
    (run / "eval" / "latent-sft" / "test.json").write_text(json.dumps({"summary": summary, "problems": []}))
    out = export_run(config, "latent-sft", run / "export")
    assert out == run / "export"
    card = (out / "README.md").read_text()
    assert "# demo\n" in card
    assert "| test | 87.4 % ± 1.2 | 500 | 12.0 | numeric | greedy |" in card
    assert "1,234 training problems" in card


def test_an_unfinished_stage_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    config = finished_run(checkpoint, tmp_path / "run", finish=False)
    with pytest.raises(ArtefactError, match=r"stage2: not finished yet"):
        export_run(config, "latent-sft", tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"stage2: not finished yet"):
        export_run(Config(run_dir=str(tmp_path / "nothing")), "latent-sft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
