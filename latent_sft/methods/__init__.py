"""The methods, in the order of tables; whatever handles methods iterates over METHODS and names none."""

from __future__ import annotations

from latent_sft.methods import (
    coconut,
    cot,
    cot2,
    icot,
    latent_sft,
    lotus,
    self_distill,
    sim_cot,
    soft_thinking,
    span_labels,
)
from latent_sft.methods.base import Method, Model, Stage

METHODS: tuple[Method, ...] = (
    cot.METHOD,
    latent_sft.METHOD,
    span_labels.METHOD,
    cot2.METHOD,
    soft_thinking.METHOD,
    icot.METHOD,
    lotus.METHOD,
    coconut.METHOD,
    self_distill.CODI,
    self_distill.PCCOT,
    self_distill.KAVA,
    sim_cot.METHOD,
)
STAGES: dict[str, Stage] = {stage.name: stage for method in METHODS for stage in method.stages}
SECTIONS: dict[str, str] = {name: stage.section for name, stage in STAGES.items()}
MODELS: dict[str, Model] = {model.name: model for method in METHODS for model in method.models}


def method_of(name: str) -> Method:
    """Return the method of a stage or model."""
    return next(m for m in METHODS if name in {s.name for s in m.stages} | {x.name for x in m.models})
