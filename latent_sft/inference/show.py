"""Solve one problem with a trained checkpoint and show what its latents say."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from latent_sft.config.schema import ModelConfig
from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.inference.engine import THINKERS
from latent_sft.inference.generate import Decoded, Sampling, generate
from latent_sft.method.superposition import entropy
from latent_sft.method.types import SPEC_FILE, LatentSpec, Superposition, ThoughtSpec
from latent_sft.models.backbone import input_table
from latent_sft.models.load import load_config, load_lm, load_tokenizer
from latent_sft.models.thoughts import THOUGHTS_FILE, Thoughts, load_thoughts
from latent_sft.runs import read_json

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLatent:
    """A latent token for reading.

    Attributes:
        entropy: of its weights, in nats.
        tokens: `(text, weight)`, the heaviest first.
    """

    entropy: float
    tokens: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A solved problem for reading.

    Attributes:
        problem: as asked.
        thinker: `latent`, `continuous`, `explicit` or `none`.
        latents: what was thought, of hidden states what the LM head makes of them; empty for the other thinkers.
        thought: written reasoning; empty for latent thinking.
        answer: text after `</think>`.
        num_steps: latents, or tokens of written reasoning.
        forward_passes: model calls, prefill included.
        finished: the answer ended by itself.
    """

    problem: str
    thinker: str
    latents: list[ShownLatent]
    thought: str
    answer: str
    num_steps: int
    forward_passes: int
    finished: bool


def generate_one(
    checkpoint: str | Path,
    problem: str,
    *,
    max_latents: int | None = None,
    min_latents: int | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    top: int = 5,
    as_json: bool = False,
) -> str:
    """Return one solved problem as a table for the terminal, or as JSON.

    Args:
        checkpoint: folder of a finished stage, exported folder, or Hub name of an exported one.
        problem: its text; the prompt around it is that of training.
        max_latents: thinking ends after; as trained by default.
        min_latents: thinking does not stop before; as trained by default.
        noise_scale: multiplier of Gumbel noise on the latents; no noise by default.
        seed: of that noise.
        top: vocabulary entries shown per latent.
        as_json: return one JSON object, see `Shown`.

    Raises:
        ArtefactError: not a checkpoint of this package.
        ConfigError: it cannot be loaded, or a setting is out of range.
    """
    changes = {"max_latents": max_latents, "min_latents": min_latents, "noise_scale": noise_scale}
    shown = solve_one(checkpoint, problem, seed=seed, top=top, **{k: v for k, v in changes.items() if v is not None})
    return json.dumps(dataclasses.asdict(shown), ensure_ascii=False) if as_json else as_table(shown)


def solve_one(checkpoint: str | Path, problem: str, *, seed: int = 0, top: int = 5, **changes: float) -> Shown:
    """Load a checkpoint and solve one problem; `changes` replace fields of its LatentSpec. See `generate_one`."""
    spec = dataclasses.replace(read_spec(checkpoint), **changes)  # type: ignore[arg-type]
    thinker_file = _find(checkpoint, "thinker.json")
    how = read_json(thinker_file) if thinker_file else {"thinker": "latent"}
    thinker = how["thinker"]
    if thinker not in THINKERS:
        raise ArtefactError(
            f"{checkpoint}: its thoughts are made from the reference CoT ({thinker!r}); expected the final folder of a "
            "model that thinks by itself."
        )
    if "thoughts" in how and changes:
        raise ConfigError(
            f"{checkpoint}: always thinks in {how['thoughts']['num_latents']} latents, and without noise; "
            f"{', '.join(sorted(changes))} cannot be set."
        )
    config = ModelConfig(dtype=_dtype(checkpoint))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(checkpoint, config)
    model = load_lm(checkpoint, config).to("cuda" if torch.cuda.is_available() else "cpu")
    noisy = bool(changes.get("noise_scale"))
    decoded = generate(
        model,
        spec,
        [render_prompt(tokenizer, spec, problem)],
        thinker=thinker,
        thoughts=_thoughts(checkpoint, ThoughtSpec(**how["thoughts"]), model) if "thoughts" in how else None,
        sampling=Sampling(latent_noise=True, seed=seed) if noisy else None,
    )[0]
    return _shown(problem, thinker, decoded, tokenizer, top)


def read_spec(checkpoint: str | Path) -> LatentSpec:
    """Return the spec beside a checkpoint.

    Raises:
        ArtefactError: there is none.
    """
    path = _find(checkpoint, SPEC_FILE)
    if path is None:
        if not Path(checkpoint).is_dir():
            raise ArtefactError(
                f"{checkpoint}: no such folder, and no checkpoint of latent_sft could be fetched from the Hub by that "
                "name (check the spelling, the network and HF_HUB_OFFLINE)."
            )
        final = Path(checkpoint) / "final"
        hint = f"Did you mean {final}?" if final.is_dir() else "Expected an exported folder or runs/NAME/STAGE/final."
        raise ArtefactError(f"{checkpoint}: not a checkpoint of latent_sft, there is no {SPEC_FILE}. {hint}")
    return LatentSpec.from_dict(read_json(path))


def as_table(shown: Shown) -> str:
    """Return the latents as a table and the answer below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    with console.capture() as capture:
        kind = THINKERS[shown.thinker]
        if kind.title and not kind.written:
            table = Table(title=f"{kind.title}: {shown.num_steps}")
            for column in ("#", "entropy", "vocabulary entries (weight)"):
                table.add_column(column, justify="left" if column.startswith("v") else "right")
            for number, latent in enumerate(shown.latents, 1):
                tokens = "  ".join(f"{text!r} {weight:.2f}" for text, weight in latent.tokens)
                table.add_row(str(number), f"{latent.entropy:.2f}", tokens)
            console.print(table)
        elif kind.title:
            console.print(f"{kind.title} ({shown.num_steps} tokens): {shown.thought}", soft_wrap=True)
        console.print(f"answer: {shown.answer}{'' if shown.finished else ' … (cut)'}", soft_wrap=True)
    return capture.get().rstrip("\n")


def _shown(problem: str, thinker: str, decoded: Decoded, tokenizer: PreTrainedTokenizerBase, top: int) -> Shown:
    latents = []
    if decoded.latent_ids is not None and decoded.latent_weights is not None:
        every = Superposition(decoded.latent_ids, decoded.latent_weights)
        for ids, weights, nats in zip(*every, entropy(every).tolist(), strict=True):
            heaviest = weights.argsort(descending=True)[:top]  # noise changes the weights and not the order of the ids
            pairs = zip(ids[heaviest].tolist(), weights[heaviest].tolist(), strict=True)
            tokens = [(tokenizer.decode([token]), round(weight, 4)) for token, weight in pairs]
            latents.append(ShownLatent(entropy=round(nats, 4), tokens=tokens))
    return Shown(
        problem=problem,
        thinker=thinker,
        latents=latents,
        thought=tokenizer.decode(decoded.thought_ids) if THINKERS[thinker].written else "",
        answer=tokenizer.decode(decoded.answer_ids).strip(),
        num_steps=decoded.num_steps,
        forward_passes=decoded.forward_passes,
        finished=decoded.finished,
    )


def _thoughts(checkpoint: str | Path, spec: ThoughtSpec, model: PreTrainedModel) -> Thoughts:
    path = _find(checkpoint, THOUGHTS_FILE)
    if path is None:
        raise ArtefactError(
            f"{checkpoint}: {THOUGHTS_FILE} is missing; a model that thinks in hidden states cannot run without it."
        )
    try:
        return load_thoughts(Path(path), spec, input_table(model).device)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ArtefactError(f"{path}: damaged ({str(error).splitlines()[0]}); train that stage again.") from error


def _find(checkpoint: str | Path, name: str) -> str | None:
    """Return the path of a file beside a local or Hub checkpoint, or None."""
    try:
        return cached_file(checkpoint, name)
    except OSError:
        return None


def _dtype(checkpoint: str | Path) -> str:
    """Return the dtype the weights were saved in, float32 where that is not said."""
    try:
        found = str(load_config(checkpoint).dtype).removeprefix("torch.")
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{checkpoint}: config.json cannot be read ({str(error).splitlines()[0]}).") from error
    return found if found in DTYPES else "float32"
