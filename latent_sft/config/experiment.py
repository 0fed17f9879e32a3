"""The configuration of an experiment: what all methods share, and one section or more of every method."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import Any

from latent_sft.config.benchmarks import benchmark
from latent_sft.config.schema import CommonConfig
from latent_sft.config.training import TrainConfig, need
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.methods import METHODS, MODELS, STAGES, method_of


class _Experiment(CommonConfig):
    """One experiment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, stage in STAGES.items():
            train = self.stage(name)
            train.check(stage.section)
            mixed, halves = train.mixed_precision, self.model.dtype == "float16"
            fits = not halves or mixed != "bf16"
            need(fits, f"{stage.section}.mixed_precision", mixed, "fp16, as model.dtype=float16")
            fits = not self.launch.zero or mixed != "fp16"
            need(fits, f"{stage.section}.mixed_precision", mixed, "bf16 or no, where launch.zero > 0")
        sets = self.sets()
        need(len(set(sets)) == len(sets), "eval.sets", list(self.eval.sets), "different sets")
        self._check_shortened()
        for method in METHODS:
            settings = self.settings(method.settings)
            method.check(settings, self.model, [name for name in STAGES if self.stage(name).enabled])
            for stage in method.stages:
                if self.stage(stage.name).enabled and not self.stage(stage.name).start_from:
                    self._check_source(method.settings, stage.source(settings))

    def _check_shortened(self) -> None:
        # the rule holds for the data of the whole run, and a method compared with shorter text must not learn from it
        others = [name for name in STAGES if self.stage(name).enabled and name not in ("no-cot", "cot")]
        expected = f"none where more than no-cot and cot is trained; give the rule to a run without {', '.join(others)}"
        need(self.data.shorten.rule == "none" or not others, "data.shorten.rule", self.data.shorten.rule, expected)

    def _check_source(self, section: str, source: str | None) -> None:
        # a stage of another method has to be trained; a method's own stages are its own affair
        if source is not None and method_of(source).settings != section:
            needed = f"{STAGES[source].section}.enabled=true, since it starts from that stage"
            need(self.stage(source).enabled, f"{section}.init", source, needed)

    def stage(self, name: str) -> TrainConfig:
        """Return the training settings of a stage by its command-line name.

        Raises:
            ConfigError: there is no such stage.
        """
        if name not in STAGES:
            raise ConfigError(f"unknown stage {name!r}.{did_you_mean(name, STAGES)}")
        return attrgetter(STAGES[name].section)(self)

    def sets(self) -> list[str]:
        """Return the names of the benchmarks that are evaluated.

        Raises:
            ConfigError: there is none of a name.
        """
        return [benchmark(text).name for text in self.eval.sets]

    def precision(self, stage: str) -> str:
        """Return the mixed precision of a stage: what it says, or what `model.dtype` makes of weights in float32."""
        said, dtype = self.stage(stage).mixed_precision, self.model.dtype
        if said == "no" and dtype == "float16":
            return "fp16"  # for its scaler: gradients of float16 end at 6e-8
        return "bf16" if said == "no" and dtype != self.trained_model.dtype else said

    def models(self) -> dict[str, list[str]]:
        """Return the models that are evaluated, each with its own training stages; the last one holds the weights."""
        found = {}
        for name, model in MODELS.items():
            own = [stage for stage in model.stages if self.stage(stage).enabled]
            trained = bool(own) if model.any_stage else own == list(model.stages)
            if trained and model.enabled(self.settings(method_of(name).settings)):
                found[name] = own
        return found

    def exports(self) -> dict[str, str]:
        """Return the latent reasoners, each with the folder of its export: the first one is `export`."""
        names = [name for name in self.models() if MODELS[name].role == "latent"]
        return {name: f"export-{name}" if number else "export" for number, name in enumerate(names)}

    def chosen_export(self, model: str | None = None) -> tuple[str, str]:
        """Return a latent reasoner, the first one unless it is named, and the folder of its export.

        Raises:
            ConfigError: the experiment trains none of that name.
        """
        folders = self.exports()
        model = model or next(iter(folders), "")
        if model not in folders:
            raise ConfigError(
                f"export: got model {model!r}, expected a latent reasoner that this experiment trains "
                f"({', '.join(folders) or 'there is none'})."
            )
        return model, folders[model]

    def settings(self, section: str) -> Any:
        """Return a method's own section, None where it has none."""
        return getattr(self, section) if section else None


Config: Any = dataclasses.make_dataclass(
    "Config",
    [
        (name, type(make()), dataclasses.field(default_factory=make))
        for method in METHODS
        for name, make in method.sections.items()
    ],
    bases=(_Experiment,),
    frozen=True,
    kw_only=True,
)
"""One experiment: `CommonConfig` with the sections of all methods."""
Config.__module__ = __name__  # so that it can be sent to other processes
