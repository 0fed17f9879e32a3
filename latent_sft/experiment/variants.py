"""The runs of a comparison: every variant with every seed, each an experiment of its own, all read before any starts.

<run>/<variant>/seed-<n>/     the run of a variant and seed, with everything an ordinary run has
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config, to_yaml
from latent_sft.config.schema import CompareConfig
from latent_sft.errors import ConfigError

_OURS = ("name", "run_dir", "seed")


class Job(NamedTuple):
    """One run of a comparison.

    Attributes:
        variant: its name.
        config: the experiment: the file, the variant's settings, those of the command line, and its seed.
    """

    variant: str
    config: Config

    @property
    def name(self) -> str:
        """`<variant>/seed-<n>`, its folder below the comparison's."""
        return f"{self.variant}/seed-{self.config.seed}"

    @property
    def directory(self) -> Path:
        """Run directory."""
        return Path(self.config.directory)

    @property
    def console(self) -> Path:
        """File of its output."""
        return self.directory / "console.log"

    def is_finished(self) -> bool:
        """Return whether a run with exactly these settings came to its end."""
        path = self.directory / "config.yaml"
        done = (self.directory / "summary.json").exists() and path.exists()
        return done and path.read_text(encoding="utf-8") == to_yaml(self.config)


def jobs_of(path: str | Path, overrides: Sequence[str] = ()) -> list[Job]:
    """Return the runs of a comparison, seed by seed, variants in the order of the file.

    Args:
        path: YAML file with `compare.variants`.
        overrides: `key=value` settings of the command line; they win over a variant's.

    Raises:
        ConfigError: a wrong setting, naming its variant.
    """
    whole = load_config(path, overrides)
    configs = {name: _variant(path, overrides, whole, name) for name in whole.compare.variants}
    return [
        Job(name, dataclasses.replace(config, seed=seed, run_dir=f"{whole.directory}/{name}/seed-{seed}"))
        for seed in whole.compare.seeds
        for name, config in configs.items()
    ]


def _variant(path: str | Path, overrides: Sequence[str], whole: Config, name: str) -> Config:
    where, settings = f"compare.variants.{name}", whole.compare.variants[name]
    for text in settings:
        key = text.partition("=")[0]
        if key in _OURS or key.split(".")[0] == "compare":
            raise ConfigError(f"{where}: {key!r} is decided by the comparison; leave it out.")
    try:
        config = load_config(path, [*settings, *overrides])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(config, name=f"{whole.name}-{name}", compare=CompareConfig())
