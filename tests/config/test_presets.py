"""An experiment is found by path first, then by the name of a preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_sft.config import presets
from latent_sft.errors import ConfigError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two presets, and an empty folder to stand in."""
    found = {name: tmp_path / "presets" / f"{name}.yaml" for name in ("quickstart", "prosqa")}
    monkeypatch.setattr(presets, "preset_paths", lambda: found)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_preset_by_name(installed: dict[str, Path], name: str) -> None:
    assert presets.resolve_config(name) == installed["quickstart"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_an_existing_file_wins(installed: dict[str, Path], name: str) -> None:
    Path(name).write_text("name: mine\n")
    assert presets.resolve_config(name) == Path(name)


def test_a_folder_of_that_name_does_not_hide_the_preset(installed: dict[str, Path]) -> None:
    Path("quickstart").mkdir()
    assert presets.resolve_config("quickstart") == installed["quickstart"]


def test_unknown_name_is_suggested(installed: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"quikstart: no such configuration file.*Did you mean 'quickstart'\?"):
        presets.resolve_config("quikstart")


def test_unknown_path_suggests_its_neighbours(installed: dict[str, Path]) -> None:
    Path("experiments").mkdir()
    Path("experiments/large.yaml").touch()
    with pytest.raises(ConfigError, match=r"Did you mean 'experiments/large.yaml'\?"):
        presets.resolve_config("experiments/larg.yaml")


def test_folder_is_refused(installed: dict[str, Path]) -> None:
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match="runs: is a folder; expected a YAML file"):
        presets.resolve_config("runs")


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert presets.preset_paths() == {}
    with pytest.raises(ConfigError, match="Give the path of a YAML file"):
        presets.resolve_config("quickstart")
