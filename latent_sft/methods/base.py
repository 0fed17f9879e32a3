"""What a method is: everything in which one differs from another. Each has a module of its own; METHODS lists them.

    Stage   one training run: its model, batches and losses, what it starts from and what it saves
    Store   latents of the training set that a stage reads, made by an earlier stage's model
    Model   what is evaluated: whose weights, and how they think
    Method  the stages and models of a paper, their settings and the words for them

The functions of a stage get a `Setup`: settings, numbers and paths, never the whole experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import LatentConfig, ModelConfig
from latent_sft.config.training import TrainConfig
from latent_sft.data.collate import Batch, LabelOf, TokenRow
from latent_sft.data.lengths import Lengths, Number
from latent_sft.inference.solve import Policy, Thinker
from latent_sft.memory import Backbone, Weights, one_model
from latent_sft.method.types import How, LatentSpec, Superposition, ThoughtSpec
from latent_sft.models.load import load_lm, merged, read_thinker, save_lm, save_thinker
from latent_sft.models.thoughts import THOUGHTS_FILE, load_thoughts

Collate = Callable[[list[dict[str, Any]]], Batch]
# (batch, which has `row_ids` besides, model under training) -> the batch to train on
Prepare = Callable[[dict[str, Any], Policy], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the functions of a stage are given.

    Attributes:
        settings: the method's section of the configuration.
        train: how the stage is trained.
        model: how language models are loaded that are not trained, and how they are adapted.
        trained_model: how those are loaded that are trained.
        spec: the LatentSpec.
        tokenizer: of the base model; None while a job is only planned, and then nothing is saved.
        start: folder or Hub name of what the stage starts from: the `final` of stage `source`, what `start_from`
            names, or the base model.
        source: name of that stage, or empty.
        base: folder or Hub name of the base model.
        root: what the first stage of the method started from.
        latents: stored latents of a row, where the stage reads a Store.
        steps_per_epoch: optimizer steps, for `curriculum` and `callbacks`; 0 before the training set is cut up.
    """

    settings: Any
    train: TrainConfig
    model: ModelConfig
    trained_model: ModelConfig
    spec: LatentSpec
    tokenizer: PreTrainedTokenizerBase
    start: str | Path
    source: str
    base: str | Path
    root: str | Path
    latents: LabelOf | None = None
    steps_per_epoch: int = 0

    @property
    def single(self) -> str | Path:
        """Where one language model starts from; of an encoder and a decoder that is the decoder."""
        decoder = Path(self.start) / "decoder"
        return decoder if decoder.is_dir() else self.start


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """What is shown when: the sampler numbers an example `phase x rows + row`, and its row gets that `phase`.

    Attributes:
        number: (rows, total optimizer steps, seed) -> (optimizer step, row) -> number.
    """

    number: Callable[[int, int, int], Number]


@dataclass(frozen=True, kw_only=True)
class Store:
    """Latents of every training row.

    Attributes:
        name: of the step that makes it, and of the command; empty where the stage that reads it makes it itself.
        folder: below the run directory.
        meaning: one line for `plan`.
        source: settings -> the stage whose model makes them; None is the base model.
        identity: settings, `latent` section -> what decides the latents beside the model.
        dtype: of the weights; empty takes `labels.dtype`.
        model: setup of the reading stage -> the model that makes them.
        encode: model, rows, batch size -> latents of each row, in order.
    """

    name: str
    folder: str
    meaning: str
    source: Callable[[Any], str | None]
    identity: Callable[[Any, LatentConfig], dict[str, Any]]
    dtype: str
    model: Callable[[Setup], nn.Module]
    encode: Callable[[Any, Sequence[TokenRow], int], Iterable[Superposition]]


@dataclass(kw_only=True)
class TrainState:
    """Where the training of a stage stands.

    Attributes:
        max_steps: optimizer steps of the whole training.
        global_step: made so far.
        best_metric: validation accuracy of the best checkpoint.
        best_global_step: at which it was written.
        seconds: of training, earlier processes included.
        trackers: of `report_to`, each with its name of the run.
    """

    max_steps: int
    global_step: int = 0
    best_metric: float | None = None
    best_global_step: int | None = None
    seconds: float = 0.0
    trackers: dict[str, str] = field(default_factory=dict)


class Callback:
    """What a stage adds to the training loop: the moments it overrides."""

    def on_begin(self, state: TrainState, rows: Any) -> None:
        """Called before the first step, with the training set."""

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step."""

    def on_log(self, state: TrainState, logs: Mapping[str, float]) -> None:
        """Called with what was logged; losses as `loss_<term>`."""

    def on_save(self, state: TrainState) -> None:
        """Called on the first process after a checkpoint was written and old ones deleted."""


def _from_base(settings: Any) -> str | None:
    return None


def _nothing(settings: Any, latent: LatentConfig) -> dict[str, Any]:
    return {}


def cross_entropy_alone(setup: Setup) -> dict[str, float]:
    """Return the one term of a stage that is trained on written tokens."""
    return {"ce": setup.train.ce_weight}


def save_plain(model: Any, setup: Setup, folder: Path, *, thinker: str, settings: How | None = None) -> None:
    """Write a language model with its tokenizer, and how it thinks."""
    save_lm(merged(model.lm), folder, setup.tokenizer)
    save_thinker(folder, setup.spec, thinker, settings)


def single_model(backbone: Backbone, setup: Setup) -> Weights:
    """Return the parameters of a stage that holds one language model and nothing else."""
    return one_model(backbone, setup.model, setup.trained_model)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run.

    Attributes:
        name: on the command line, and of its folder.
        section: dotted place of its TrainConfig in the configuration.
        meaning: one line for `plan`.
        thinker: module -> how validation problems are solved.
        model: setup -> module whose forward returns a `StepOutput`, ready to train.
        batch: setup -> rows to batch.
        lengths: training set, setup -> padded lengths, for batches of a number of tokens.
        save: module, setup, folder -> writes the final folder.
        terms: setup -> weight of each loss term; the batch has its `count_<term>`. A model may leave out those of 0.
        source: settings -> the stage whose final model it starts from; None is the base model.
        identity: settings, `latent` section -> what decides the result beside data, model and training settings.
        reads: the latents it is trained on.
        prepare: setup -> what makes a batch with the model under training: called for every micro-batch of a step,
            before the first forward pass, without gradients. What it draws should come from `Policy.random`, so that
            cutting a step and resuming change nothing. None trains on the batch as it is.
        callbacks: module, setup -> what listens to the training loop.
        curriculum: setup -> what is shown when; None shows every row as it is.
        parameters: sizes of the base model, setup -> parameters it holds, for `plan`.
        more_positions: setup -> positions per row beyond those of the batch that its passes go over, for `plan`.
    """

    name: str
    section: str
    meaning: str
    thinker: Callable[[Any], Thinker]
    model: Callable[[Setup], nn.Module]
    batch: Callable[[Setup], Collate]
    lengths: Callable[[Any, Setup], Lengths]
    save: Callable[[Any, Setup, Path], None]
    terms: Callable[[Setup], dict[str, float]] = cross_entropy_alone
    source: Callable[[Any], str | None] = _from_base
    identity: Callable[[Any, LatentConfig], dict[str, Any]] = _nothing
    reads: Store | None = None
    prepare: Callable[[Setup], Prepare | None] = lambda setup: None
    callbacks: Callable[[Any, Setup], list[Callback]] = lambda model, setup: []
    curriculum: Callable[[Setup], Curriculum | None] = lambda setup: None
    parameters: Callable[[Backbone, Setup], Weights] = single_model
    more_positions: Callable[[Setup], int] = lambda setup: 0


def load_saved(folder: Path, model: ModelConfig, spec: LatentSpec, settings: Any, device: torch.device) -> Thinker:
    """Load the model of a `final` or exported folder; it thinks as `thinker.json` says, else in latent tokens."""
    lm = load_lm(folder, model)
    lm.to(device)  # type: ignore[arg-type]  # transformers wraps it in a decorator that loses its types
    kind, how = read_thinker(folder)
    if isinstance(how, ThoughtSpec):
        return Thinker(kind, lm, load_thoughts(folder / THOUGHTS_FILE, how, device))
    return Thinker(kind, lm, mixture=how)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is evaluated.

    Attributes:
        name: in tables and folders.
        meaning: one line for the report.
        colour: in plots.
        role: `baseline` (differences are taken to it), `latent` (trained to think in latents, reads nothing but the
            problem; can be exported), `oracle` (has read the reference CoT), or empty.
        stages: its own training stages; the last that is enabled holds the weights.
        enabled: settings -> whether it is evaluated, where all of `stages` are trained.
        any_stage: whether one of the stages is enough.
        reasons: it thinks before it answers, so that its thoughts can be exchanged.
        identity: settings -> what decides its answers beside weights, spec and `eval`.
        load: folder, `model` section, spec, settings, device -> the model and how it thinks.
    """

    name: str
    meaning: str
    colour: str
    role: str = ""
    stages: tuple[str, ...]
    enabled: Callable[[Any], bool] = lambda settings: True
    any_stage: bool = False
    reasons: bool = True
    identity: Callable[[Any], dict[str, Any]] = lambda settings: {}
    load: Callable[[Path, ModelConfig, LatentSpec, Any, torch.device], Thinker] = load_saved


@dataclass(frozen=True, kw_only=True)
class Method:
    """The stages and models of a paper.

    Attributes:
        title: as papers write it.
        settings: name of its own section of the configuration; empty where it has none beyond `train`.
        sections: sections of the configuration -> how their defaults are made.
        stages: in the order in which they are trained.
        models: in the order of tables.
        arxiv: number of the paper.
        paper: its title.
        story: a sentence for the model card: how a model of it learned to think.
        published: `compat: published` sets these, section by section.
        check: settings, `model` section, enabled stages -> raises a ConfigError where they do not go together.
    """

    title: str
    settings: str = ""
    sections: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    models: tuple[Model, ...] = ()
    arxiv: str = ""
    paper: str = ""
    story: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Any, ModelConfig, Sequence[str]], None] = lambda settings, model, stages: None
