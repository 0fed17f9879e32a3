"""The two types everything shares: `Superposition` (the currency) and `LatentSpec` (the settings that travel)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from latent_sft.errors import ConfigError

SPEC_FORMAT = 1
SPEC_FILE = "latent_spec.json"
THINKER_FILE = "thinker.json"


class Superposition(NamedTuple):
    """A latent token: a weighted set of vocabulary entries (paper: alpha_i over the kept set K_i).

    Full vocabulary is the case K = V; an ordinary token is K = 1 with weight 1.

    Attributes:
        ids: `[..., K]` integer token ids.
        weights: `[..., K]` floating point, non-negative, summing to 1 over the last dimension.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec:
    """What a latent token is and how thinking starts and stops, in one place.

    Shared by data, training, labels, decoding, evaluation and export, and saved as `latent_spec.json` beside the
    weights. Two artefacts with different `fingerprint()` do not fit together.

    Attributes:
        think_ids: tokens of the opening delimiter (`<think>`), the last tokens of every prompt (paper: B).
        end_think_ids: tokens of the closing delimiter (`</think>`), one or several (paper: E).
        eos_id: token that ends the answer.
        pad_id: token used for padding; never recognised by value.
        vocab_size: rows of the embedding table.
        rate: CoT tokens per latent (paper: r); with `segmentation="step"` it is not used.
        segmentation: `fixed` (every `rate` tokens, as the paper) or `step` (one latent per CoT step).
        top_k: kept vocabulary entries of a latent (published code: 10; paper: the full vocabulary).
        projection: table that turns hidden states into logits over the vocabulary: `input` (published code) or
            `head` (paper). The same for tied models.
        exclude_end: keep the first token of `</think>` out of every latent (published: no). Where an encoder is free to
            use it, some labels have it as their top-1, and a student that learns such a label stops thinking there.
        temperature: of the superposition softmax in the encoder (published: 1).
        marker_positions: `stretched` (published: plain 0..T-1 over text and markers) or `transparent` (a marker
            takes the position of the CoT token before it, so the text keeps its own positions).
        marker_input: input embedding of a marker: `learned` (published: one trained vector), or `previous` (that of the
            CoT token before it plus a trained vector that starts at zero). With transparent positions `previous`
            starts from the model's own next-token prediction, so the first latents already mean something.
        noise_scale: Gumbel noise multiplier on stage-2 labels and sampled latents; 0 turns it off (published: 1).
        noise_temperature: softmax temperature after the noise (published: 1).
        noise_clip: the scaled noise is clamped to this range (published: -1.5, 3.0).
        decode_temperature: of the softmax over the student's top-k logits while thinking (published: 1).
        min_latents: thinking does not stop before this many latents.
        max_latents: thinking is ended after this many latents.
        max_answer_tokens: the answer is cut after this many tokens.
        prompt_template: `chat` (the tokenizer's chat template) or a text with `{problem}`.
        system_prompt: instruction text, empty for none.
        system_placement: `system` (a turn of its own) or `user` (in front of the problem).
    """

    think_ids: tuple[int, ...]
    end_think_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    vocab_size: int
    rate: int = 2
    segmentation: str = "fixed"
    top_k: int = 10
    projection: str = "input"
    exclude_end: bool = True
    temperature: float = 1.0
    marker_positions: str = "transparent"
    marker_input: str = "learned"
    noise_scale: float = 0.0
    noise_temperature: float = 1.0
    noise_clip: tuple[float, float] = (-1.5, 3.0)
    decode_temperature: float = 1.0
    min_latents: int = 0
    max_latents: int = 128
    max_answer_tokens: int = 64
    prompt_template: str = "{problem}\n"
    system_prompt: str = ""
    system_placement: str = "user"

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, expected: str) -> None:
            if not ok:
                raise ConfigError(f"latent.{key}: got {getattr(self, key)!r}, expected {expected}.")

        need(len(self.think_ids) > 0, "think_ids", "at least one token")
        need(len(self.end_think_ids) > 0, "end_think_ids", "at least one token")
        need(self.rate >= 1, "rate", "an integer >= 1 (CoT tokens per latent)")
        need(self.segmentation in ("fixed", "step"), "segmentation", "'fixed' or 'step'")
        need(
            1 <= self.top_k <= self.vocab_size,
            "top_k",
            f"1 to {self.vocab_size}, the vocabulary of this model (a latent keeps top_k of its entries)",
        )
        need(self.projection in ("input", "head"), "projection", "'input' or 'head'")
        need(self.temperature > 0, "temperature", "a number > 0")
        need(self.decode_temperature > 0, "decode_temperature", "a number > 0")
        need(self.noise_temperature > 0, "noise_temperature", "a number > 0")
        need(self.noise_scale >= 0, "noise_scale", "a number >= 0")
        need(self.noise_clip[0] < self.noise_clip[1], "noise_clip", "[low, high] with low < high")
        need(self.marker_positions in ("stretched", "transparent"), "marker_positions", "'stretched' or 'transparent'")
        need(self.marker_input in ("learned", "previous"), "marker_input", "'learned' or 'previous'")
        need(0 <= self.min_latents <= self.max_latents, "min_latents", f"0 to max_latents={self.max_latents}")
        need(self.max_answer_tokens >= 1, "max_answer_tokens", "an integer >= 1")
        need(self.system_placement in ("system", "user"), "system_placement", "'system' or 'user'")
        if self.prompt_template != "chat":
            need(self.prompt_template.count("{problem}") == 1, "prompt_template", "'chat' or a text with one {problem}")
        for name in ("think_ids", "end_think_ids"):
            need(all(0 <= t < self.vocab_size for t in getattr(self, name)), name, f"ids below {self.vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_dict` reads back."""
        return {"format": SPEC_FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentSpec:
        """Build a spec from `to_dict` output (lists become tuples).

        Raises:
            ConfigError: unknown format or fields.
        """
        values = dict(values)
        found = values.pop("format", None)
        if found != SPEC_FORMAT:
            raise ConfigError(
                f"{SPEC_FILE}: format {found!r}, expected {SPEC_FORMAT}; use a matching latent_sft version."
            )
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"{SPEC_FILE}: unknown fields {sorted(unknown)}; made by a newer latent_sft version?")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when any value changes."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThoughtSpec:
    """How a model thinks in hidden states; stands in `thinker.json` beside the weights.

    Attributes:
        num_latents: M, always as many.
        iterations: T Jacobi iterations over all latents at once; M (or more) is one latent after another, 0 pause
            tokens.
        projection: hidden states pass a small network before they are fed back.
        added: an iteration feeds every latent its own state, added to the placeholder; else the state before it, alone.
    """

    key: ClassVar[str] = "thoughts"
    thinker: ClassVar[str] = "continuous"
    num_latents: int
    iterations: int
    projection: bool = False
    added: bool = False

    @property
    def sequential(self) -> bool:
        """Whether every latent sees the final ones before it, which T >= M comes to where states move on by one."""
        return not self.added and self.iterations >= self.num_latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Soft:
    """How a model trained on written CoT thinks in mixtures of tokens (Soft Thinking, arXiv 2505.15778), untrained.

    Attributes:
        temperature: of the token distribution.
        top_k: tokens of a mixture at most; 1 is greedy decoding.
        top_p: the fewest tokens with this mass of the distribution.
        min_p: tokens below this share of the likeliest one are left out.
        cold_stop_entropy: nats; 0 never stops.
        cold_stop_steps: thinking is ended at so many steps in a row below that entropy.
        noise_scale: multiplier of Gumbel noise on the logarithms of the weights (arXiv 2508.03440); 0 none.
        noise_temperature: of the softmax after that noise.
    """

    temperature: float = 0.6
    top_k: int = 10
    top_p: float = 0.95
    min_p: float = 0.0
    cold_stop_entropy: float = 0.01
    cold_stop_steps: int = 256
    noise_scale: float = 0.0
    noise_temperature: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanCode:
    """How latents stand for spans of tokens (`method.spans`); stands in `thinker.json` beside the weights.

    Attributes:
        rho: ratio of the weight of a span's token to that of the token before it.
        longest: S, tokens of a span at most.
        snap: what is fed back while thinking: `none` the latent as predicted; `nearest`, `likeliest` or `greedy` the
            code word found for it (`method.spans.Snapper`).
    """

    key: ClassVar[str] = "spans"
    thinker: ClassVar[str] = "spans"
    rho: float
    longest: int
    snap: str = "nearest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixtures:
    """How a model thinks in its own whole softmax, always so many times; stands in `thinker.json` beside the weights.

    Attributes:
        num_latents: steps.
    """

    key: ClassVar[str] = "mixtures"
    thinker: ClassVar[str] = "mixtures"
    num_latents: int


How = ThoughtSpec | SpanCode | Mixtures  # what `thinker.json` can hold
Mixing = Soft | SpanCode | Mixtures  # settings of thinkers that feed mixtures of tokens
