"""Run directories: atomic writes, fingerprints, and the life of a step."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from latent_sft.config.schema import LatentConfig
from latent_sft.errors import ArtefactError
from latent_sft.runs import (
    FINISHED,
    MANIFEST,
    RUNNING,
    Step,
    environment,
    file_sha256,
    fingerprint,
    outcome_of,
    read_json,
    write_atomically,
    write_json,
)

INPUTS = {"latent": {"rate": 2, "top_k": 10}, "data": "abc"}


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ------------------------------------------------------------------------------------------------------------- writing


def test_text_and_bytes_are_written_and_folders_made(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.txt", "é\n")
    write_atomically(str(tmp_path / "c.bin"), b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "é\n".encode()
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        message = f"{path}: could not be written (No space left on device); the previous file is untouched."
        with pytest.raises(ArtefactError, match=re.escape(message)):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["manifest.json"], "the unfinished part was left behind"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_readers_never_see_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last moment the old content is in place; the new one is complete before it takes the name."""
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    seen = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(target).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_atomically(path, "new")
    assert seen == [("new", "old")]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="could not be written"):
        write_atomically(tmp_path / "file" / "x.json", "{}")


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": 1, "a": [1.5, None, "é"], "path": Path("x/y")}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"b": 1, "a": [1.5, None, "é"], "path": "x/y"}
    assert list(read_json(tmp_path / "x.json")) == ["b", "a", "path"]


@pytest.mark.parametrize("content", [b'{"status": "fini', b"", b"\xff\xfe"])
def test_damaged_json_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"{re.escape(str(path))}: damaged JSON"):
        read_json(path)


def test_missing_json_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"x.json: missing\."):
        read_json(tmp_path / "x.json")


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_is_16_hex_digits_whatever_the_order_of_keys() -> None:
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(1))
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})


def test_fingerprint_sees_every_value_and_the_order_of_parts() -> None:
    assert len({fingerprint({"a": 1}), fingerprint({"a": 2}), fingerprint({"a": "1"}), fingerprint({"b": 1})}) == 4
    assert fingerprint("a", "b") != fingerprint("b", "a")


def test_fingerprint_of_a_dataclass_is_that_of_its_values() -> None:
    latent = LatentConfig()
    assert fingerprint(latent) == fingerprint(dataclasses.asdict(latent))
    assert fingerprint(latent) != fingerprint(dataclasses.replace(latent, rate=4))


def test_file_sha256_reads_in_pieces(tmp_path: Path) -> None:
    data = b"latent" * 400_000  # more than two pieces
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_environment_names_versions_and_revision() -> None:
    found = environment()
    assert found["versions"]["torch"] != "not installed"
    assert found["git"].keys() == {"revision", "dirty"}
    json.dumps(found)


# --------------------------------------------------------------------------------------------------------------- steps


def test_life_of_a_step(tmp_path: Path) -> None:
    step = Step(directory=tmp_path / "stage2", inputs=INPUTS)
    assert step.manifest() is None and not step.is_finished()
    with pytest.raises(ArtefactError, match="not finished yet"):
        step.results()

    step.begin(seed=7)
    manifest = step.manifest()
    assert manifest is not None
    assert (manifest["status"], manifest["seed"], manifest["inputs"]) == (RUNNING, 7, INPUTS)
    assert manifest["fingerprint"] == step.fingerprint
    assert {"versions", "git", "started"} <= manifest.keys()
    assert not step.is_finished()
    with pytest.raises(ArtefactError, match="not finished yet"):
        step.results()

    step.finish(accuracy=0.95)
    assert step.is_finished()
    assert step.results()["status"] == FINISHED
    assert step.results()["accuracy"] == 0.95
    assert step.results()["seed"] == 7, "what `begin` recorded is kept"


def test_asking_writes_nothing(tmp_path: Path) -> None:
    step = Step(directory=tmp_path / "stage2", inputs=INPUTS)
    step.is_finished()
    assert not step.directory.exists()


def test_a_killed_step_begins_again(tmp_path: Path) -> None:
    Step(directory=tmp_path, inputs=INPUTS).begin(seed=0)
    again = Step(directory=tmp_path, inputs=dict(reversed(INPUTS.items())))
    assert not again.is_finished()
    again.begin(seed=0)
    again.finish()
    assert again.is_finished()


@pytest.mark.parametrize("finished", [True, False])
def test_another_experiment_is_refused_naming_the_difference(tmp_path: Path, finished: bool) -> None:
    first = Step(directory=tmp_path, inputs=INPUTS)
    first.begin(seed=0)
    if finished:
        first.finish()
    before = (tmp_path / MANIFEST).read_bytes()
    other = Step(directory=tmp_path, inputs={"latent": {"rate": 4, "top_k": 10}, "data": "abc", "new": 1})
    changes = "latent.rate was 2, now 4; new was None, now 1"
    message = f"{tmp_path}: made by another experiment ({changes}). Nothing was overwritten."
    with pytest.raises(ArtefactError, match=re.escape(message)):
        other.is_finished()
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_tuples_and_paths_in_the_inputs_survive_the_manifest(tmp_path: Path) -> None:
    inputs = {"clip": (-1.5, 3.0), "path": tmp_path}
    step = Step(directory=tmp_path / "x", inputs=inputs)
    step.begin(seed=0)
    step.finish()
    assert step.is_finished()
    with pytest.raises(ArtefactError, match=r"\(clip was \[-1.5, 3.0\], now \[-1.5, 2.0\]\)"):
        Step(directory=tmp_path / "x", inputs={**inputs, "clip": (-1.5, 2.0)}).is_finished()


def test_a_full_disk_at_the_end_leaves_the_step_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(directory=tmp_path, inputs=INPUTS)
    step.begin(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ArtefactError, match="No space left on device"):
            step.finish(accuracy=1.0)
    assert not step.is_finished()
    assert step.manifest()["status"] == RUNNING


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"status": "fin', "damaged JSON"),
        ("[]", "not the manifest of a step; delete"),
        ("{}", "not the manifest of a step; delete"),
        ('{"status": "finished"}', "not the manifest of a step; delete"),
    ],
)
def test_a_damaged_manifest_is_one_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    step = Step(directory=tmp_path, inputs=INPUTS)
    for ask in (step.is_finished, step.results, lambda: step.begin(seed=0)):
        with pytest.raises(ArtefactError, match=re.escape(message)) as caught:
            ask()
        assert str(tmp_path / MANIFEST) in str(caught.value)
    assert (tmp_path / MANIFEST).read_text() == content


@pytest.mark.parametrize("history", [[], [{"step": 10, "of": 10, "fingerprint": "before"}]])
def test_a_manifest_says_what_is_made_from_the_step(tmp_path: Path, history: list[dict[str, object]]) -> None:
    """Costs of a model are found by this, also where a stage was trained on after its end."""
    step = Step(directory=tmp_path, inputs={"step": "cot", "betas": (0.9, 0.98)})
    step.begin(0, history)
    manifest = step.manifest()
    assert manifest is not None
    assert outcome_of(manifest) == step.outcome
    assert (step.outcome == step.fingerprint) is (not history)
