"""Latent-SFT (arXiv 2510.15522): an encoder compresses the CoT into latents, which the model learns to produce itself.

stage 1   encoder, decoder, union: the decoder must recover chunks and answer from the encoder's latents
label     the union's encoder runs over the training set
stage 2   KL to the stored latents, cross-entropy on the answer; the encoder is gone
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latent_sft.config.schema import LatentConfig, ModelConfig
from latent_sft.config.training import TrainConfig, need
from latent_sft.data.collate import TokenRow, encoder_batch, stage1_batch, stage1_lengths, stage2_batch, stage2_lengths
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.inference.solve import Thinker
from latent_sft.memory import Backbone, Weights, itemsize
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.methods.base import (
    Callback,
    Collate,
    Curriculum,
    Method,
    Model,
    Setup,
    Stage,
    Store,
    TrainState,
    cross_entropy_alone,
    save_plain,
)
from latent_sft.methods.common import drawn_anew
from latent_sft.models.backbone import head_table, input_table
from latent_sft.models.load import add_lora, initial_marker, load_lm, merged, save_lm, save_thinker, trainable, twin
from latent_sft.models.sharding import gathered_parameters
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.stage2 import Stage2Model

MARKER_FILE = "marker.safetensors"
ADAPTERS_FILE = "adapters.safetensors"  # of both halves, where they share a backbone
PHASES = ("stage1-encoder", "stage1-decoder", "stage1-union")


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Encoder against a frozen decoder, decoder against a frozen encoder, then both (paper section 3)."""

    init: Literal["base", "cot"] = "base"
    """What encoder and decoder start from: the base model, or the `cot` stage's checkpoint."""
    noise_scale: float = 0.0
    """Gumbel noise on the latents while stage 1 trains (published: 0). The student of stage 2 reproduces latents only
    nearly; a decoder that has read noisy ones still reads those."""
    noise_start: float = 0.5
    """Share of a phase's steps before that noise begins; from the first step on it keeps a phase from converging."""
    reconstruct: Literal["next", "suffix"] = "next"
    """What the decoder recovers. next: from each latent the chunk that follows (published). suffix: from the latents up
    to one drawn anew each time a row is shown, all that follows: chunks, `</think>` and answer (LatentGRM)."""
    first_chunk: Literal["skip", "filler"] = "skip"
    """skip: nothing recovers the first chunk (published). filler: a latent of the prompt alone stands in front of the
    others, in stage 2 and while solving too, and the first chunk is recovered from it."""
    span_weight: float = 0.0
    """Weight of a loss term that draws each latent to the code word of its chunk (see `spans`): KL over the vocabulary
    at the marker, while an encoder trains."""
    span_rho: float = 0.7
    """Ratio of the weight of a chunk's token to the one before, in those code words."""
    span_until: float = 1.0
    """Share of a phase's steps over which that weight falls to 0, linearly; 1 keeps it."""
    attention: Literal["auto", "two_track", "flex", "dense"] = "auto"
    """How the structured attention is computed, not what: two_track and flex (CUDA) skip masked pairs, dense builds
    the whole mask and is the reference. auto: two_track where the model can, else dense."""
    share_backbone: bool = False
    """With model.lora: encoder and decoder are two adapters on one frozen model instead of two copies of it."""
    encoder: TrainConfig = field(default_factory=TrainConfig)
    decoder: TrainConfig = field(default_factory=TrainConfig)
    union: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        need(self.noise_scale >= 0, "stage1.noise_scale", self.noise_scale, "a number >= 0")
        need(0 <= self.noise_start < 1, "stage1.noise_start", self.noise_start, "0 <= share < 1")
        need(self.span_weight >= 0, "stage1.span_weight", self.span_weight, "a number >= 0")
        need(0 < self.span_rho <= 1, "stage1.span_rho", self.span_rho, "0 < rho <= 1")
        need(0 < self.span_until <= 1, "stage1.span_until", self.span_until, "0 < share <= 1")

    @property
    def filler(self) -> bool:
        """Whether a latent of the prompt alone stands in front of the others."""
        return self.first_chunk == "filler"

    @property
    def layout(self) -> dict[str, bool]:
        """How `stage1_batch` and `stage1_lengths` lay rows out."""
        return {"suffix": self.reconstruct == "suffix", "filler": self.filler}


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """The store of soft labels."""

    batch_size: int = 64
    shard_size: int = 1000
    """Rows a shard; a killed run loses at most the shard it was writing."""
    dtype: Literal["float16", "float32"] = "float16"
    num_processes: int = 1

    def __post_init__(self) -> None:
        need(self.batch_size >= 1, "labels.batch_size", self.batch_size, "an integer >= 1")
        need(self.shard_size >= 1, "labels.shard_size", self.shard_size, "an integer >= 1")
        need(self.num_processes >= 1, "labels.num_processes", self.num_processes, "an integer >= 1")


@torch.inference_mode()
def oracle_latents(model: Stage1Model, rows: Sequence[TokenRow], batch_size: int) -> Iterable[Superposition]:
    """Yield the encoder's latents `[N, K]` of every row, on the CPU, in order."""
    was_training = model.training
    model.eval()
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        batch = {k: v.to(model.marker.device) for k, v in encoder_batch(chunk, model.spec, model.filler).items()}
        with gathered_parameters(model.parameters()):
            latent = model.encode(batch)
        ids, weights = latent.ids.cpu(), latent.weights.float().cpu()
        for b, count in enumerate(batch["latent_mask"].sum(1).tolist()):
            yield Superposition(ids[b, :count].clone(), weights[b, :count].clone())
    model.train(was_training)


def load_stage1(
    folder: Path, encoder: ModelConfig, decoder: ModelConfig, spec: LatentSpec, attention: str = "auto"
) -> Stage1Model:
    """Load encoder, decoder and marker from a finished phase, each in the way that is given.

    Raises:
        ArtefactError: the folder is incomplete.
    """
    if not (folder / MARKER_FILE).exists():
        raise ArtefactError(f"{folder / MARKER_FILE}: missing; run that stage-1 phase again.")
    halves = load_lm(folder / "encoder", encoder), load_lm(folder / "decoder", decoder)
    return Stage1Model(*halves, load_file(folder / MARKER_FILE)["marker"], spec, attention)


def phase_start(setup: Setup, *, encoder: bool = False, decoder: bool = False) -> Stage1Model:
    """Return encoder, decoder and marker as a phase of stage 1, or `label`, finds them.

    Those of the phase before; the first phase starts with two copies of the base model (or the `cot` stage's) and the
    initial marker. `encoder` and `decoder` say which of the two are to be trained.
    """
    first, second = (setup.trained_model if trained else setup.model for trained in (encoder, decoder))
    attention = setup.settings.attention
    if setup.source in PHASES or (Path(setup.start) / MARKER_FILE).exists():
        model = load_stage1(Path(setup.start), first, second, setup.spec, attention)
    else:
        reader = load_lm(setup.start, first)
        marker = initial_marker(reader, setup.spec)
        model = Stage1Model(reader, load_lm(setup.start, second), marker, setup.spec, attention)
    model.filler = setup.settings.filler
    return model


def shared_start(setup: Setup) -> Stage1Model:
    """Return encoder and decoder as two sets of adapters on one frozen model, as a phase of stage 1 finds them.

    Adapters go on from the phase before; they are not folded into the weights, which both halves share.

    Raises:
        ArtefactError: the phase before was trained with two models.
    """
    if (Path(setup.root) / MARKER_FILE).exists():
        first = _enabled(setup.settings)[0].removeprefix("stage1-")
        raise ConfigError(
            f"stage1.{first}.start_from: {setup.root} holds an encoder and a decoder, expected one model where "
            "stage1.share_backbone is true. Give one of its two folders."
        )
    encoder = load_lm(setup.root, setup.model)
    decoder, marker = twin(encoder), initial_marker(encoder, setup.spec)
    model = Stage1Model(encoder, decoder, marker, setup.spec, attention=setup.settings.attention)
    model.encoder = add_lora(model.encoder, setup.model.lora)
    model.decoder = add_lora(model.decoder, setup.model.lora)
    model.filler = setup.settings.filler
    if setup.source in PHASES:
        path = Path(setup.start) / ADAPTERS_FILE
        if not path.exists():
            raise ArtefactError(f"{path}: missing; that phase was trained without stage1.share_backbone. Run it again.")
        model.load_state_dict(load_file(path), strict=False)
    return model


def _stage1_model(setup: Setup, *, encoder: bool, decoder: bool) -> nn.Module:
    if setup.settings.share_backbone:
        model, adapted = shared_start(setup), lambda lm, lora: lm
    else:
        model, adapted = phase_start(setup, encoder=encoder, decoder=decoder), trainable
    lora = setup.model.lora
    model.encoder = adapted(model.encoder, lora) if encoder else model.encoder.requires_grad_(False)
    model.decoder = adapted(model.decoder, lora) if decoder else model.decoder.requires_grad_(False)
    model.marker.requires_grad_(encoder)
    # the encoder's head is not part of the loss; an untied one would be a parameter without gradient
    if head_table(model.encoder) is not input_table(model.encoder):
        head_table(model.encoder).requires_grad_(False)
    return model


def _stage1_batch(setup: Setup) -> Collate:
    # with stored latents of a frozen encoder, these take the place of the encoder's half
    settings = setup.settings
    return partial(
        stage1_batch,
        spec=setup.spec,
        loss_reduction=setup.train.loss_reduction,
        label_of=setup.latents,
        span_rho=settings.span_rho if settings.span_weight else 0.0,
        **settings.layout,
    )


def _save_stage1(model: Stage1Model, setup: Setup, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"marker": model.marker.detach().cpu().contiguous()}
    encoder = model.encoder
    if setup.settings.share_backbone:
        adapters = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if ".lora_" in n}
        save_file({**adapters, **marker}, folder / ADAPTERS_FILE)
        encoder = copy.deepcopy(encoder)  # merged in place, its adapters would be in the decoder's weights too
    for name, lm in (("encoder", encoder), ("decoder", model.decoder)):
        save_lm(merged(lm), folder / name, setup.tokenizer)
        save_thinker(folder / name, setup.spec, "oracle")
    save_file(marker, folder / MARKER_FILE)


def _stage2_model(setup: Setup) -> nn.Module:
    lm = load_lm(setup.single, setup.trained_model)
    return Stage2Model(trainable(lm, setup.model.lora), setup.spec)


def _stage2_batch(setup: Setup) -> Collate:
    assert setup.latents is not None
    return partial(stage2_batch, spec=setup.spec, label_of=setup.latents, loss_reduction=setup.train.loss_reduction)


class LateNoise(Callback):
    """Turns the noise of stage 1 on after a share of the phase."""

    def __init__(self, model: Stage1Model, scale: float, start: float) -> None:
        self.model, self.scale, self.start = model, scale, start

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Set the scale of the coming step; a resumed run finds it by its step."""
        self.model.noise_scale = self.scale if state.global_step >= self.start * state.max_steps else 0.0


class FadingSpans(Callback):
    """Lowers the share of the span term to 0 over a share of the phase."""

    def __init__(self, model: Stage1Model, until: float) -> None:
        self.model, self.until = model, until

    def on_step(self, state: TrainState, optimizer: torch.optim.Optimizer) -> None:
        """Set the share of the coming step; a resumed run finds it by its step."""
        self.model.span_share = max(0.0, 1 - state.global_step / (self.until * state.max_steps))


def _callbacks(model: Any, setup: Setup) -> list[Callback]:
    settings = setup.settings
    found: list[Callback] = []
    if settings.noise_scale:
        found.append(LateNoise(model, settings.noise_scale, settings.noise_start))
    if settings.span_weight and settings.span_until < 1:
        found.append(FadingSpans(model, settings.span_until))
    return found


# what decides the encoder's latents; noise and limits of decoding do not
_ENCODER_SETTINGS = (
    "rate",
    "segmentation",
    "top_k",
    "projection",
    "exclude_end",
    "temperature",
    "marker_positions",
    "marker_input",
)
_LIMITS = ("min_latents", "max_latents", "max_answer_tokens")


def encoder_settings(settings: Stage1Config, latent: LatentConfig) -> dict[str, Any]:
    """Return what decides the latents of an encoder."""
    found = {key: getattr(latent, key) for key in _ENCODER_SETTINGS}
    return {**found, "first_chunk": settings.first_chunk} if settings.filler else found


def _phase_identity(settings: Stage1Config, latent: LatentConfig) -> dict[str, Any]:
    # what is off is not named, so that runs older than it stay what they were
    more: dict[str, Any] = {"share_backbone": True} if settings.share_backbone else {}
    if settings.reconstruct != "next":
        more["reconstruct"] = settings.reconstruct
    if settings.span_weight:
        more["span"] = [settings.span_weight, settings.span_rho, settings.span_until]
    noise = [settings.noise_scale, settings.noise_start]
    return {"noise": noise, "latent": encoder_settings(settings, latent), **more}


def _stage2_identity(settings: Stage1Config, latent: LatentConfig) -> dict[str, Any]:
    return {"latent": {k: v for k, v in dataclasses.asdict(latent).items() if k not in _LIMITS}}


def _enabled(settings: Stage1Config) -> list[str]:
    return [name for name in PHASES if getattr(settings, name.removeprefix("stage1-")).enabled]


def _before(name: str, settings: Stage1Config) -> str | None:
    phases = _enabled(settings)
    earlier = phases[: phases.index(name)] if name in phases else phases
    if earlier:
        return earlier[-1]
    return "cot" if settings.init == "cot" else None


def _last_phase(settings: Stage1Config) -> str:
    phases = _enabled(settings)
    if not phases:
        raise ConfigError("stage1: no phase is trained, but labels and stage 2 need an encoder: name stage1 or one.")
    return phases[-1]


def _phase_parameters(backbone: Backbone, setup: Setup, *, encoder: bool, decoder: bool) -> Weights:
    item, whole, adapters = itemsize(setup.model), itemsize(setup.trained_model), backbone.adapters
    shared, marker = setup.settings.share_backbone, backbone.shape.hidden
    if adapters:  # in float32, as PEFT and the marker keep them
        held = (1 if shared else 2) * item * backbone.size
        trained = adapters * (encoder + decoder) + marker * encoder
        idle = 4 * adapters * (2 - encoder - decoder) if shared else 0
        return Weights(trained, 4 * trained, held + idle + 4 * marker * (not encoder), backbone.largest, item)
    held = backbone.size * ((whole if encoder else item) + (whole if decoder else item))
    # the encoder's own head is not part of the loss
    trained = (backbone.size - backbone.head) * encoder + backbone.size * decoder
    trained_bytes = whole * trained + 4 * marker * encoder
    frozen_bytes = held + 4 * marker - trained_bytes
    return Weights(trained + marker * encoder, trained_bytes, frozen_bytes, backbone.largest, whole, decoder)


def _oracle(model: Any) -> Thinker:
    return Thinker("latent", model.decoder, oracle=partial(oracle_latents, model))


def _load_oracle(
    folder: Path, model: ModelConfig, spec: LatentSpec, settings: Stage1Config, device: torch.device
) -> Thinker:
    loaded = load_stage1(folder, model, model, spec, settings.attention).to(device)
    loaded.filler = settings.filler
    return _oracle(loaded)


FROZEN_ENCODER = Store(
    name="",
    folder="stage1-decoder-latents",
    meaning="the frozen encoder's latents, which the decoder phase reads",
    source=partial(_before, "stage1-decoder"),
    identity=encoder_settings,
    dtype="float32",  # exact, so that the phase gives what running its frozen encoder would give
    model=phase_start,
    encode=oracle_latents,
)
LABELS = Store(
    name="label",
    folder="labels",
    meaning="the encoder's latents of every training problem, stored",
    source=_last_phase,
    identity=encoder_settings,
    dtype="",
    model=phase_start,
    encode=oracle_latents,
)


def _phase(name: str, meaning: str, *, encoder: bool, decoder: bool, reads: Store | None = None) -> Stage:
    return Stage(
        name=name,
        section=name.replace("-", "."),
        meaning=meaning,
        thinker=_oracle,
        source=partial(_before, name),
        identity=_phase_identity,
        reads=reads,
        model=partial(_stage1_model, encoder=encoder, decoder=decoder),
        batch=_stage1_batch,
        lengths=lambda data, setup: stage1_lengths(data, setup.spec, **setup.settings.layout),
        # the span term has nothing to train where the encoder is frozen
        terms=lambda setup: cross_entropy_alone(setup) | ({"span": setup.settings.span_weight} if encoder else {}),
        curriculum=lambda setup: Curriculum(number=drawn_anew) if setup.settings.reconstruct == "suffix" else None,
        save=_save_stage1,
        callbacks=_callbacks,
        parameters=partial(_phase_parameters, encoder=encoder, decoder=decoder),
    )


def _check(settings: Stage1Config, model: ModelConfig, stages: Sequence[str]) -> None:
    shared = settings.share_backbone
    need(not shared or model.lora.rank > 0, "stage1.share_backbone", True, "false, or adapters: model.lora.rank > 0")
    for name in _enabled(settings)[1:] if shared else ():
        part = name.removeprefix("stage1-")
        given = getattr(settings, part).start_from
        need(not given, f"stage1.{part}.start_from", given, "empty, or stage1.share_backbone=false")


METHOD = Method(
    title="Latent-SFT",
    arxiv="2510.15522",
    paper="LLM Latent Reasoning as Chain of Superposition",
    story="An encoder learned to compress reasoning into such tokens; then this model learned to produce them.",
    settings="stage1",
    check=_check,
    sections={"stage1": Stage1Config, "labels": LabelsConfig, "stage2": TrainConfig},
    stages=(
        _phase(
            "stage1-encoder",
            "encoder learns to compress CoT chunks into latents, decoder frozen",
            encoder=True,
            decoder=False,
        ),
        _phase(
            "stage1-decoder",
            "decoder learns to read the latents, which the frozen encoder stores first",
            encoder=False,
            decoder=True,
            reads=FROZEN_ENCODER,
        ),
        _phase("stage1-union", "encoder and decoder together", encoder=True, decoder=True),
        Stage(
            name="stage2",
            section="stage2",
            meaning="the model learns to produce the latents by itself, then the answer",
            thinker=lambda model: Thinker("latent", model.lm),
            source=_last_phase,
            identity=_stage2_identity,
            reads=LABELS,
            model=_stage2_model,
            batch=_stage2_batch,
            lengths=lambda data, setup: stage2_lengths(data, setup.spec, setup.settings.filler),
            terms=lambda setup: {"ce": setup.train.ce_weight, "kl": setup.train.kl_weight},
            save=partial(save_plain, thinker="latent"),
        ),
    ),
    models=(
        Model(
            name="stage1",
            meaning="the oracle, whose encoder has read the reference CoT",
            colour="#c98a1b",
            role="oracle",
            stages=PHASES,
            any_stage=True,
            load=_load_oracle,
        ),
        Model(
            name="latent-sft",
            meaning="thinks in mixtures of vocabulary embeddings",
            colour="#b3365e",
            role="latent",
            stages=("stage2",),
        ),
    ),
    published={  # DJC-GO-SOLO/Latent-SFT at f361814, the code of arXiv 2510.15522 v2; see docs/internals/method.md
        "latent": {
            "marker_positions": "stretched",  # default position ids over text and markers
            "marker_input": "learned",
            "exclude_end": False,  # any token may be part of a latent
            "noise_scale": 1.0,  # Gumbel noise on the stage-2 labels
            "noise_temperature": 1.0,
            "noise_clip": [-1.5, 3.0],
            "projection": "input",
            "temperature": 1.0,
            "top_k": 10,
        },
        "stage1": {phase: {"loss_reduction": "token"} for phase in ("encoder", "decoder", "union")},
        "stage2": {"loss_reduction": "token", "ce_weight": 1.0, "kl_weight": 1.0},
    },
)
