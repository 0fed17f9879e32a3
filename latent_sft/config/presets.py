"""Find an experiment by path or by preset name; `configs/` is installed as the package `latent_sft.presets`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from latent_sft.errors import ConfigError, did_you_mean


def preset_paths() -> dict[str, Path]:
    """Return the YAML files that are installed with the package, by name without `.yaml`."""
    spec = find_spec("latent_sft.presets")
    folders = spec.submodule_search_locations if spec is not None else None
    return {path.stem: path for folder in folders or () for path in sorted(Path(folder).glob("*.yaml"))}


def resolve_config(name: str) -> Path:
    """Return the file of an experiment: an existing path wins, else a preset with or without `.yaml`.

    Args:
        name: what the user wrote, for example `configs/quickstart.yaml`, `quickstart.yaml` or `quickstart`.

    Raises:
        ConfigError: neither a file nor a preset.
    """
    path = Path(name)
    if path.is_file():
        return path
    presets = preset_paths()
    if name.removesuffix(".yaml") in presets:
        return presets[name.removesuffix(".yaml")]
    if path.is_dir():
        raise ConfigError(f"{name}: is a folder; expected a YAML file, or a preset.{did_you_mean(path.name, presets)}")
    # names beside a mistyped path are better suggestions than the presets
    beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent != Path() else []
    hint = did_you_mean(name, [*presets, *beside]) if presets or beside else " Give the path of a YAML file."
    raise ConfigError(f"{name}: no such configuration file, and no preset of that name.{hint}")


def inherited(name: str, file: Path) -> Path:
    """Return the file that `name`, with or without `.yaml`, means in the `defaults` of `file`.

    Raises:
        ConfigError: neither a file beside it nor a preset, or a base of the presets.
    """
    presets = preset_paths()
    for folder in (file.parent, *sorted({path.parent for path in presets.values()})):
        for path in (folder / name, folder / f"{name}.yaml"):
            if path.is_file():
                return Path(os.path.normpath(path))
    near = [*presets, *(path.stem for path in file.parent.glob("*.yaml"))]
    raise ConfigError(f"{file}: defaults: {name!r} is no file beside it, and no preset.{did_you_mean(name, near)}")
