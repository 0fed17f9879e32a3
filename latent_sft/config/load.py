"""Defaults <- a YAML and those it inherits <- `key=value` overrides, as frozen dataclasses. Only here is OmegaConf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from latent_sft.config.experiment import Config
from latent_sft.config.presets import inherited, resolve_config
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.methods import METHODS, SECTIONS

Layers = list[tuple[str, Any]]
"""Where values come from (a file, an override), and the values."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the experiment's configuration.

    Args:
        path: YAML file, or the name of a preset such as quickstart; None takes the defaults.
        overrides: `key.sub=value` strings, the strongest.

    Raises:
        ConfigError: missing file, broken YAML, unknown key (with a suggestion), wrong type, value out of range.
    """
    layers = _read_files(resolve_config(str(path))) if path is not None else []
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {text!r}: expected key=value, for example latent.rate=4.")
        try:
            # an empty value means the empty string, not YAML's null: `data.validation=`
            layer = OmegaConf.from_dotlist([text if value else f"{key}=''"])
        except Exception as error:  # the value is read as YAML, which raises its own family of errors
            raise ConfigError(f"override {text!r}: the value is not valid YAML; quote it.") from error
        layers.append((f"override {text!r}", layer))
    merged = OmegaConf.structured(Config)
    if [said for _, layer in layers if (said := OmegaConf.select(layer, "compat"))][-1:] == ["published"]:
        merged = OmegaConf.merge(merged, *(method.published for method in METHODS))
    given: dict[str, Any] = {}
    for _, layer in layers:
        given |= flat(OmegaConf.to_container(layer))
    merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{place}.enabled=true" for place in _named(given)]))
    layers = [(where, _spread(layer)) for where, layer in layers]
    try:
        merged = OmegaConf.merge(merged, *(layer for _, layer in layers))
    except OmegaConfBaseException:
        _explain(merged, layers)
        raise
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    return _tuples(config)


def _named(given: dict[str, Any]) -> list[str]:
    """Return the places of what is named: a stage by its own section, or by its method's where that picks no stage."""
    # to switch something off names nothing, else it would switch on what stands beside it
    off = {key for key, value in given.items() if value is False and key.endswith(".enabled")}

    def is_named(place: str) -> bool:
        return any(f"{key}.".startswith(f"{place}.") for key in given if key not in off)

    found = []
    for method in METHODS:
        places = [stage.section for stage in method.stages] or [method.settings]
        inside = [place for place in places if place.startswith(f"{method.settings}.")]
        found += [place for place in places if is_named(place)]
        picked = [place for place in inside if is_named(place) and f"{place}.enabled" not in off]
        if is_named(method.settings) and not picked:
            found += inside
    return found


def _spread(layer: Any) -> Any:
    # `train` of a file or override goes to every stage, below what the same file says of a stage itself
    train = OmegaConf.select(layer, "train")
    if not OmegaConf.is_dict(train):
        return layer
    stages = OmegaConf.create()
    for section in SECTIONS.values():
        OmegaConf.update(stages, section, train)
    return OmegaConf.merge({"train": train}, stages, layer)  # `train` first, so that a mistake is reported there


def _explain(merged: Any, layers: Layers) -> None:
    """Merge layer by layer, which takes far longer than all at once, and raise a ConfigError for the one that fails."""
    for where, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            raise ConfigError(_unknown_key(where, layer)) from error
        except OmegaConfBaseException as error:
            key = error.full_key or _refused_key(layer)
            raise ConfigError(f"{where}: {key}: {str(error).splitlines()[0]}") from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def dotted_keys() -> list[str]:
    """Return every dotted key of the schema, sorted; the golden list of the tests and the source of suggestions."""
    return sorted(flat(OmegaConf.to_container(OmegaConf.structured(Config))))


def _read_files(path: Path, above: tuple[Path, ...] = ()) -> Layers:
    """Return a file's layer behind those of the files it inherits, which stand in its `defaults`."""
    if path.resolve() in above:
        chain = " -> ".join(str(p) for p in (*above[above.index(path.resolve()) :], path.resolve()))
        raise ConfigError(f"{path}: inherits itself: {chain}; take it out of one of their `defaults`.")
    layer = _read_yaml(path)
    names = layer.pop("defaults", [])
    if not OmegaConf.is_list(names) and names != []:
        raise ConfigError(f"{path}: defaults: got {names!r}, expected a list of files to inherit, as [base.yaml].")
    found: Layers = []
    for name in names:
        # a file that two others inherit counts once, where it is first
        found += [x for x in _read_files(inherited(str(name), path), (*above, path.resolve())) if x not in found]
    for key in [key for key, value in OmegaConf.to_container(layer).items() if value is None]:
        layer[key] = {}  # `cot:` alone names a stage as `cot: {}` does
    return [*found, (str(path), layer)]


def _read_yaml(path: Path) -> Any:
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml raises its own family of errors; all mean the same to the user
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path}: expected a mapping of sections at the top level.")
    return layer


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the dotted keys of nested sections; an empty one is a key, since `cot: {}` names a stage."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        inside = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return found


def _unknown_key(where: str, layer: Any) -> str:
    known = dotted_keys()
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    sections |= {s.rsplit(".", 1)[0] for s in sections if "." in s}
    given = flat(OmegaConf.to_container(layer))
    unknown = [key for key in given if key not in known and key not in sections]
    key = unknown[0] if unknown else "?"
    return f"{where}: unknown key {key!r}.{did_you_mean(key, known)}"


def _refused_key(layer: Any) -> str:
    # OmegaConf names no key where a section or a list is replaced as a whole: merge the keys one by one to find it
    for key in flat(OmegaConf.to_container(layer)):
        try:
            OmegaConf.update(OmegaConf.structured(Config), key, OmegaConf.select(layer, key))
        except OmegaConfBaseException:
            return key
    return "?"


def _tuples(node: Any) -> Any:
    # OmegaConf returns lists where the schema says tuple
    values = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            value = _tuples(value)
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return type(node)(**values)
