"""latent_sft: teach a causal language model to reason in latent tokens. Importing this imports nothing heavy.

`load(checkpoint).generate(problem)` solves; `load_config`, `train_stage` and `run` do what the verbs of the command do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_sft.config.load import load_config
    from latent_sft.experiment.run import run_experiment as run
    from latent_sft.inference.show import Reasoner, Solution, load
    from latent_sft.method.types import LatentSpec, Superposition
    from latent_sft.train.run import train_stage

__version__ = "0.1.0"
__all__ = ["LatentSpec", "Reasoner", "Solution", "Superposition", "load", "load_config", "run", "train_stage"]

_HOME = {
    "LatentSpec": "method.types.LatentSpec",
    "Reasoner": "inference.show.Reasoner",
    "Solution": "inference.show.Solution",
    "Superposition": "method.types.Superposition",
    "load": "inference.show.load",
    "load_config": "config.load.load_config",
    "run": "experiment.run.run_experiment",
    "train_stage": "train.run.train_stage",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
