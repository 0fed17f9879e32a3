"""The benchmarks that are known by name, from `configs/sets/benchmarks.yaml`, which is installed with the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from latent_sft.config.schema import DataConfig, EvalConfig, FieldsConfig, ShortenConfig, SyntheticConfig
from latent_sft.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of problems; every value is explained in the file."""

    name: str
    source: str
    licence: str
    rows: int
    format: str = "records"
    fields: dict[str, str] = field(default_factory=dict)
    grader: str
    samples: int = 1

    def data(self, config: DataConfig) -> DataConfig:
        """Return a `data` section whose test split are these problems; limits and `on_error` are those given."""
        return replace(
            config,
            train="synthetic",  # nothing is read of it
            synthetic=SyntheticConfig(),
            validation="",
            test=self.source,
            test_format=self.format,
            fields=FieldsConfig(**self.fields),
            test_fields={},
            limit_test=0,
            shorten=ShortenConfig(),
        )

    def settings(self, config: EvalConfig) -> EvalConfig:
        """Return an `eval` section with this grader and, unless that says how many, so many samples per problem."""
        changes = {"num_samples": self.samples, "sample": True} if self.samples > 1 == config.num_samples else {}
        return replace(config, grader=self.grader, **changes)


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return all of them by name."""
    (folder,) = find_spec("latent_sft.presets").submodule_search_locations  # type: ignore[union-attr]
    listed = yaml.safe_load((Path(folder) / "sets" / "benchmarks.yaml").read_text(encoding="utf-8"))
    return {name: Benchmark(name=name, **values) for name, values in listed.items()}


def benchmark(text: str) -> Benchmark:
    """Return the benchmark that `NAME`, or `NAME=SOURCE`, names.

    Raises:
        ConfigError: there is none of that name.
    """
    name, _, source = text.partition("=")
    if name not in benchmarks():
        known = benchmarks()
        raise ConfigError(f"eval.sets: unknown set {name!r}.{did_you_mean(name, known, shown=len(known))}")
    found = benchmarks()[name]
    return dataclasses.replace(found, source=source) if source else found
