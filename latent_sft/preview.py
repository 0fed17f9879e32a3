"""The training set as it will be trained on: read, tokenised and laid out by the stages, before anything is spent.

Every row that is shown comes out of a stage's own batch, so it is what training sees. Needs the tokenizer and the sizes
of the model, no weights; writes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from latent_sft.config.experiment import Config
from latent_sft.data.dataset import META, tokenized_splits
from latent_sft.data.lengths import count_tokens
from latent_sft.data.parts import parts_of
from latent_sft.data.reading import as_table
from latent_sft.data.records import load_splits
from latent_sft.errors import LatentSFTError
from latent_sft.forecast import Examples, plan_setup, tokenizer_of
from latent_sft.inference.solve import as_rows
from latent_sft.methods import STAGES
from latent_sft.methods.base import Setup
from latent_sft.runs import read_json

PARTS, TOKENS = 12, 40  # of a row, and of a part of it, that the text shows


def preview(config: Config, rows: int = 5) -> dict[str, Any]:
    """Return what was read, lengths, and the first rows of train as every enabled stage lays them out.

    Args:
        config: the experiment; bad rows are counted here even where they would end a run.
        rows: how many rows.

    Returns:
        `read` {split: see `data.reading`}, `lengths` {part: mean, p95, max} of train in tokens, `beyond` {limit of
        decoding: rows of train that are longer}, `rows` [{id, stage, phase, parts or error}].

    Raises:
        DataError, ConfigError: a source cannot be read at all, or the model has no tokenizer here.
    """
    counted = dataclasses.replace(config, data=dataclasses.replace(config.data, on_error="skip"))
    found: dict[str, Any] = {"read": {}, "on_error": config.data.on_error}
    with TemporaryDirectory() as folder, _silent():
        splits = load_splits(counted.data)
        tokenizer, spec, positions = tokenizer_of(counted, splits)
        data = tokenized_splits(counted.data, tokenizer, spec, splits, Path(folder), positions)
        for split in data:
            kept, meta = len(data[split]), read_json(Path(folder) / split / META)
            generated = {"source": "synthetic", "format": "", "weight": 1.0, "rows": kept, "used": kept}
            found["read"][split] = meta["read"] or [{**generated, "held_out": 0, "skipped": meta["skipped"]}]
        columns = {"prompt": "prompt", "CoT": "cot", "latents": "segment_lengths", "answer": "answer"}
        lengths = {part: count_tokens(data["train"], column).numpy() for part, column in columns.items()}
        chosen, count = as_rows(data["train"], rows), len(data["train"])
    caps = {
        f"latent.max_latents={spec.max_latents}": lengths["latents"] > spec.max_latents,
        f"eval.max_cot_tokens={config.eval.max_cot_tokens}": lengths["CoT"] > config.eval.max_cot_tokens,
        f"latent.max_answer_tokens={spec.max_answer_tokens}": lengths["answer"] > spec.max_answer_tokens,
    }
    found["lengths"] = {
        part: {"mean": float(n.mean()), "p95": float(np.percentile(n, 95)), "max": int(n.max())}
        for part, n in lengths.items()
    }
    found["beyond"] = {cap: int(longer.sum()) for cap, longer in caps.items()}
    stages = [name for name in STAGES if config.stage(name).enabled]
    found["rows"] = []
    for name in stages:
        setup = dataclasses.replace(plan_setup(config, name, Examples(count, chosen, [], spec)), tokenizer=tokenizer)
        phases = _phases(name, setup, config, count, len(chosen))
        for row, phase in zip(chosen, phases, strict=True):
            shown = {"id": row["id"], "stage": name, **({} if phase is None else {"phase": phase})}
            found["rows"].append(shown | _laid_out(name, setup, row if phase is None else {**row, "phase": phase}))
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Return a preview for reading, coloured on a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    with console.capture() as capture:
        for split, sources in found["read"].items():
            console.print(f"{split}\n{as_table(sources)}\n", soft_wrap=True)
        bad = sum(sum(source["skipped"].values()) for sources in found["read"].values() for source in sources)
        if bad and found["on_error"] == "raise":
            console.print(f"data.on_error=raise: a run would end at the first of these {bad:,} rows\n", style="red")
        table = Table("tokens of a training row", box=None, pad_edge=False)
        for column in ("mean", "p95", "max"):
            table.add_column(column, justify="right")
        for part, values in found["lengths"].items():
            table.add_row(part, f"{values['mean']:.1f}", f"{values['p95']:.0f}", f"{values['max']:,}")
        console.print(table)
        for cap, longer in found["beyond"].items():
            if longer:
                console.print(f"{longer:,} rows are longer than {cap}: no model can write them out", style="yellow")
        for row in found["rows"]:
            phase = f", phase {row['phase']} (as at the end of its curriculum)" if "phase" in row else ""
            console.print(f"\n{row['stage']}: row {row['id']}{phase}", style="bold")
            if "error" in row:
                console.print(row["error"], style="red", soft_wrap=True)
                continue
            table = Table("part", "reads", "is to predict", box=None, pad_edge=False)
            apart = [[p for p in row["parts"] if p["part"].startswith("encoder") is first] for first in (True, False)]
            for part in (*_few(apart[0]), *_few(apart[1])):
                covers = f"{_text(part['reads'])} stands for {_text(part['covers'])}" if part.get("covers") else ""
                table.add_row(part["part"], covers or _text(part["reads"]), _text(part["learns"]))
            for column, style in zip(table.columns, ("cyan", "", "green"), strict=True):
                column.style, column.overflow = style, "fold"
            console.print(table)
    return capture.get().rstrip("\n")


@contextmanager
def _silent() -> Iterator[None]:
    # what reading would say is in the result
    logger = logging.getLogger("latent_sft.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _phases(name: str, setup: Setup, config: Config, count: int, rows: int) -> Sequence[int | None]:
    train = setup.train
    size = train.global_batch_size or train.micro_batch_size * train.gradient_accumulation_steps * config.launch.nproc
    steps = math.ceil(count / size)
    setup = dataclasses.replace(setup, steps_per_epoch=steps)
    curriculum = STAGES[name].curriculum(setup)
    if curriculum is None:
        return [None] * rows
    total = train.max_steps or math.ceil(train.epochs * steps)
    number = curriculum.number(count, total, config.seed)
    return [number(max(0, total - 1), row) // count for row in range(rows)]


def _laid_out(name: str, setup: Setup, row: dict[str, Any]) -> dict[str, Any]:
    tokenizer = setup.tokenizer
    try:
        batch = STAGES[name].batch(setup)([row])
    except LatentSFTError as error:
        return {"error": str(error)}
    made = STAGES[name].reads is None
    return {"parts": parts_of(batch, row, setup.spec, lambda token: str(tokenizer.decode([token])), labels=made)}


def _few(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(parts) <= PARTS:
        return parts
    left_out = {"part": f"... {len(parts) - PARTS} more", "reads": [], "learns": []}
    return [*parts[: PARTS - 4], left_out, *parts[-4:]]


def _text(texts: Sequence[str]) -> str:
    few = texts if len(texts) <= TOKENS else [*texts[: TOKENS - 8], f"...{len(texts) - TOKENS} more...", *texts[-8:]]
    return "|".join(text.replace("\n", "\\n") for text in few)
