"""Solve problems with a trained checkpoint and show what its latents say."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import ModelConfig
from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ArtefactError, ConfigError, did_you_mean
from latent_sft.inference.engine import THINKERS
from latent_sft.inference.generate import Decoded, Sampling
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.superposition import entropy
from latent_sft.method.types import SPEC_FILE, LatentSpec, Superposition
from latent_sft.methods.base import load_saved
from latent_sft.models.load import load_config, load_tokenizer
from latent_sft.models.thoughts import THOUGHTS_FILE
from latent_sft.runs import read_json

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLatent:
    """A latent token for reading.

    Attributes:
        entropy: of its weights, in nats.
        tokens: `(text, weight)`, the heaviest first.
        span: the text that it stands for, where latents stand for spans of the CoT.
        ids: of the tokens.
    """

    entropy: float
    tokens: list[tuple[str, float]]
    span: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A solved problem.

    Attributes:
        problem: as asked.
        thinker: `latent`, `continuous`, `explicit` or `none`.
        latents: what was thought, of hidden states what the LM head makes of them; empty for the other thinkers.
        thought: written reasoning; of latents that stand for spans of it, what they say; empty for others.
        answer: text after `</think>`.
        num_steps: latents, or tokens of written reasoning.
        forward_passes: model calls, prefill included.
        finished: the answer ended by itself.
        superposition: the same latents as tensors, ids and weights `[N, k]`; None for the other thinkers.
    """

    problem: str
    thinker: str
    latents: list[ShownLatent]
    thought: str
    answer: str
    num_steps: int
    forward_passes: int
    finished: bool
    superposition: Superposition | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """Return all but the tensors as one JSON object."""
        shown = dataclasses.asdict(dataclasses.replace(self, superposition=None))
        del shown["superposition"]
        return json.dumps(shown, ensure_ascii=False)


class Options(TypedDict, total=False):
    """How problems are solved.

    Attributes:
        max_latents: thinking ends after; as trained by default.
        min_latents: thinking does not stop before; as trained by default.
        noise_scale: multiplier of Gumbel noise on the latents; none by default.
        seed: of that noise; 0 by default.
        top: vocabulary entries shown per latent; 5 by default.
        batch_size: problems decoded together; 64 by default.
        max_cot_tokens: written reasoning ends after; 512 by default.
    """

    max_latents: int
    min_latents: int
    noise_scale: float
    seed: int
    top: int
    batch_size: int
    max_cot_tokens: int


_OF_SPEC = ("max_latents", "min_latents", "noise_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoner:
    """A trained checkpoint, ready to solve problems; made by `load`.

    Attributes:
        checkpoint: where it came from.
        spec: settings it was trained with.
        thinker: the model (`thinker.lm`) and how it thinks.
        tokenizer: its tokenizer.
    """

    checkpoint: str
    spec: LatentSpec
    thinker: Thinker
    tokenizer: PreTrainedTokenizerBase

    @overload
    def generate(self, problems: str, **options: Unpack[Options]) -> Solution: ...

    @overload
    def generate(self, problems: list[str], **options: Unpack[Options]) -> list[Solution]: ...

    def generate(self, problems: str | list[str], **options: Unpack[Options]) -> Solution | list[Solution]:
        """Solve one problem, or a list of them; greedy but for noise on the latents.

        Args:
            problems: text of one problem, or of several; the prompt around it is that of training.
            options: see Options.

        Returns:
            One solution for a text, a list in the order of the problems for a list.

        Raises:
            ConfigError: an option is out of range, or means nothing for this checkpoint.
        """
        for name in options.keys() - Options.__annotations__.keys():
            raise ConfigError(f"generate: unknown option {name!r}.{did_you_mean(name, Options.__annotations__)}")
        asked = [problems] if isinstance(problems, str) else problems
        if not isinstance(asked, list) or not all(isinstance(problem, str) for problem in asked):
            raise ConfigError(f"generate: got {problems!r}, expected the text of a problem, or a list of texts.")
        changes = {name: options[name] for name in _OF_SPEC if name in options}  # type: ignore[literal-required]
        spec = self.adjusted(**changes).spec
        decoded = solve(
            self.thinker,
            spec,
            [{"prompt": render_prompt(self.tokenizer, spec, problem)} for problem in asked],
            batch_size=options.get("batch_size", 64),
            max_cot_tokens=options.get("max_cot_tokens", 512),
            sampling=Sampling(latent_noise=True, seed=options.get("seed", 0)) if options.get("noise_scale") else None,
        )
        pairs = zip(asked, decoded, strict=True)
        solved = [_solution(*pair, self.thinker.kind, self.tokenizer, options.get("top", 5)) for pair in pairs]
        return solved[0] if isinstance(problems, str) else solved

    def adjusted(self, thinker: str | None = None, **changes: float) -> Reasoner:
        """Return it with other settings of decoding.

        Args:
            thinker: `none` answers at once; as trained by default.
            changes: `min_latents`, `max_latents`, `noise_scale` or `max_answer_tokens`.

        Raises:
            ConfigError: one is out of range, or means nothing for this checkpoint.
        """
        own, thoughts = self.thinker.kind, self.thinker.thoughts
        known = dict.fromkeys((own, "none", *(("explicit",) if own == "soft" else ())))
        if thinker not in (None, *known):
            raise ConfigError(f"{self.checkpoint}: cannot think as {thinker!r}; expected {' or '.join(known)}.")
        fixed = sorted(changes.keys() & {*_OF_SPEC})
        if fixed and thoughts is not None:
            raise ConfigError(
                f"{self.checkpoint}: always thinks in {thoughts.spec.num_latents} latents, and without noise; "
                f"{', '.join(fixed)} cannot be set."
            )
        how = self.thinker if thinker in (None, own) else Thinker(thinker, self.thinker.lm)
        spec = dataclasses.replace(self.spec, **changes)  # type: ignore[arg-type]  # a mistake is an error there
        return dataclasses.replace(self, spec=spec, thinker=how)


def load(checkpoint: str | Path, device: str | None = None) -> Reasoner:
    """Load a checkpoint.

    Args:
        checkpoint: folder of a finished stage (`runs/NAME/STAGE/final`), exported folder, or Hub name of one.
        device: as torch names it; the GPU where there is one by default.

    Raises:
        ArtefactError: not a checkpoint of this package, or damaged.
        ConfigError: its tokenizer or its weights cannot be loaded.
    """
    folder = local_folder(checkpoint)
    spec = read_spec(folder)
    config = ModelConfig(dtype=_dtype(folder))  # type: ignore[arg-type]  # one of DTYPES
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(folder, config)
    try:
        thinker = load_saved(folder, config, spec, None, where)
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{checkpoint}: {THOUGHTS_FILE} is missing; a model that thinks in hidden states cannot run without it."
        ) from error
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        path = folder / THOUGHTS_FILE
        raise ArtefactError(f"{path}: damaged ({str(error).splitlines()[0]}); train that stage again.") from error
    if thinker.kind not in THINKERS:
        raise ArtefactError(
            f"{checkpoint}: its thoughts are made from the reference CoT ({thinker.kind!r}); expected the final folder "
            "of a model that thinks by itself."
        )
    return Reasoner(checkpoint=str(checkpoint), spec=spec, thinker=thinker, tokenizer=tokenizer)


def read_spec(folder: str | Path) -> LatentSpec:
    """Return the spec in the folder of a checkpoint.

    Raises:
        ArtefactError: there is none.
    """
    path = Path(folder) / SPEC_FILE
    if not path.exists():
        final = Path(folder) / "final"
        hint = f"Did you mean {final}?" if final.is_dir() else "Expected an exported folder or runs/NAME/STAGE/final."
        raise ArtefactError(f"{folder}: not a checkpoint of latent_sft, there is no {SPEC_FILE}. {hint}")
    return LatentSpec.from_dict(read_json(path))


def as_table(solution: Solution) -> str:
    """Return the latents as a table and the answer below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    with console.capture() as capture:
        kind = THINKERS[solution.thinker]
        if kind.title and not kind.written:
            table = Table(title=f"{kind.title}: {solution.num_steps}")
            for column in ("#", "entropy"):
                table.add_column(column, justify="right")
            for column in (*(["stands for"] if kind.readable else []), "vocabulary entries (weight)"):
                table.add_column(column)
            for number, latent in enumerate(solution.latents, 1):
                tokens = "  ".join(f"{text!r} {weight:.2f}" for text, weight in latent.tokens)
                table.add_row(str(number), f"{latent.entropy:.2f}", *([latent.span] if kind.readable else []), tokens)
            console.print(table)
        elif kind.title:
            console.print(f"{kind.title} ({solution.num_steps} tokens): {solution.thought}", soft_wrap=True)
        console.print(f"answer: {solution.answer}{'' if solution.finished else ' … (cut)'}", soft_wrap=True)
    return capture.get().rstrip("\n")


def shown_latents(
    decoded: Decoded, thinker: str, tokenizer: PreTrainedTokenizerBase, top: int, first: int = 0
) -> list[ShownLatent]:
    """Return the latents from the `first` on for reading, with the `top` heaviest tokens of each."""
    if decoded.latent_ids is None or decoded.latent_weights is None:
        return []
    latents = []
    every = Superposition(decoded.latent_ids[first:], decoded.latent_weights[first:])
    spans = decoded.spans[first:] if THINKERS[thinker].readable and decoded.spans else [[]] * len(every.ids)
    for ids, weights, nats, span in zip(*every, entropy(every).tolist(), spans, strict=True):
        heaviest = weights.argsort(descending=True)[:top]  # noise changes the weights and not the order of the ids
        chosen = ids[heaviest].tolist()
        pairs = zip(chosen, weights[heaviest].tolist(), strict=True)
        tokens = [(str(tokenizer.decode([token])), round(weight, 4)) for token, weight in pairs]
        text = str(tokenizer.decode(span)) if span else ""
        latents.append(ShownLatent(entropy=round(nats, 4), tokens=tokens, span=text, ids=chosen))
    return latents


def _solution(problem: str, decoded: Decoded, thinker: str, tokenizer: PreTrainedTokenizerBase, top: int) -> Solution:
    every = None
    if decoded.latent_ids is not None and decoded.latent_weights is not None:
        every = Superposition(decoded.latent_ids, decoded.latent_weights)
    return Solution(
        problem=problem,
        thinker=thinker,
        latents=shown_latents(decoded, thinker, tokenizer, top),
        thought=str(tokenizer.decode(decoded.thought_ids)) if THINKERS[thinker].readable else "",
        answer=str(tokenizer.decode(decoded.answer_ids)).strip(),
        num_steps=decoded.num_steps,
        forward_passes=decoded.forward_passes,
        finished=decoded.finished,
        superposition=every,
    )


def local_folder(checkpoint: str | Path) -> Path:
    """Return the local folder of a checkpoint, fetched from the Hub where there is none.

    Raises:
        ArtefactError: neither a folder nor a name that the Hub knows.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(str(checkpoint)))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{checkpoint}: no such folder, and no checkpoint of latent_sft could be fetched from the Hub by that "
            "name (check the spelling, the network and HF_HUB_OFFLINE)."
        ) from error


def _dtype(folder: Path) -> str:
    """Return the dtype the weights were saved in, float32 where that is not said."""
    try:
        found = str(load_config(folder).dtype).removeprefix("torch.")
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder}: config.json cannot be read ({str(error).splitlines()[0]}).") from error
    return found if found in DTYPES else "float32"
