"""Train, validation and test records from the sources of a configuration, every row validated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latent_sft.config.schema import DataConfig, SyntheticConfig
from latent_sft.data.formats import Record, RowFormat, parse_row
from latent_sft.data.readers import RawRow, read_rows, source_fingerprint
from latent_sft.data.synthetic import generate
from latent_sft.errors import ConfigError, DataError
from latent_sft.runs import fingerprint, write_atomically

__all__ = ["Record", "Splits", "content_hash", "load_splits"]

SYNTHETIC = "synthetic"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The data of an experiment.

    Attributes:
        train: rows to learn from, each with a chain of thought.
        validation: rows to choose checkpoints on.
        test: rows to report on; may be empty.
        num_skipped: bad rows left out (`data.on_error=skip`).
        validation_from_train: whether validation was split off train, for want of a source.
        sources: what each split was made from (SHA-256 of a file, or a description) and a hash of its rows as read,
            which also changes with the format, the limits and the split.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    num_skipped: int
    validation_from_train: bool
    sources: dict[str, str]


def load_splits(config: DataConfig, *, skipped_to: Path | None = None) -> Splits:
    """Read and validate all splits.

    A row of train needs a chain of thought; validation and test rows need only problem and answer. Where no
    validation source is given, whole problems are held out of train (`validation_size`, `split_seed`), before
    `limit_train`, so that experiments with other limits validate on the same problems. Problems of train that occur
    in an evaluation split are counted in a warning.

    Args:
        config: sources, formats and limits.
        skipped_to: JSONL file for the rows left out with `on_error=skip`, each with file, line and reason.

    Raises:
        DataError: a bad row (`file:line: field ...`) with `on_error=raise`, a damaged source, a split without rows.
        ConfigError: sources that do not fit together.
    """
    if config.test == SYNTHETIC != config.train:
        raise ConfigError(
            f"data.test: got 'synthetic' while data.train is {config.train!r}; expected a source of the same task. "
            "Give one, or `data.test=` for none."
        )
    sources = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.train == SYNTHETIC and not config.validation:
        sources["validation"] = SYNTHETIC
    generated = generate(config.synthetic) if SYNTHETIC in sources.values() else {}
    skipped: list[dict[str, str | int]] = []
    loaded: dict[str, list[Record]] = {}
    for split, source in sources.items():
        if source == SYNTHETIC:
            loaded[split] = generated[split]
        elif source:
            loaded[split] = list(_load(source, split, config, skipped))
            if not loaded[split]:
                raise DataError(f"{source}: no usable rows; expected at least one for {split}.")
        else:
            loaded[split] = []
    _report_skipped(skipped, skipped_to)

    described = {split: _describe(source, config.synthetic) for split, source in sources.items() if source}
    from_train = not sources["validation"]
    if from_train:
        loaded["train"], loaded["validation"] = _hold_out(loaded["train"], config)
        described["validation"] = f"{config.validation_size} problems of train, split_seed {config.split_seed}"
    loaded["train"] = loaded["train"][: config.limit_train or None]
    loaded["test"] = loaded["test"][: config.limit_test or None]
    for split in ("validation", "test"):
        _warn_of_overlap(loaded["train"], loaded[split], split)
    return Splits(
        train=loaded["train"],
        validation=loaded["validation"],
        test=loaded["test"],
        num_skipped=len(skipped),
        validation_from_train=from_train,
        sources={split: f"{text}; rows {content_hash(loaded[split])}" for split, text in described.items()},
    )


def content_hash(records: list[Record]) -> str:
    """Return 16 hex digits over every text of the records, in order."""
    digest = hashlib.sha256()
    for r in records:
        digest.update(json.dumps([r.id, r.problem, r.cot, r.cot_answer, r.answer, r.steps]).encode())
    return digest.hexdigest()[:16]


def _load(source: str, split: str, config: DataConfig, skipped: list[dict[str, str | int]]) -> Iterator[Record]:
    other_names = {} if split == "train" else getattr(config, f"{split}_fields")
    row_format = RowFormat(
        name=("" if split == "train" else getattr(config, f"{split}_format")) or config.format,
        fields=dataclasses.replace(config.fields, **other_names),
        equations=config.cot_style == "equations",
        need_cot=split == "train",
    )
    first_seen: dict[str, int] = {}
    for row in read_rows(source):
        try:
            record = _parse(row, row_format, split, first_seen)
        except DataError as error:
            if config.on_error == "raise":
                raise DataError(f"{row.where}: {error} Fix it, or leave such rows out: data.on_error=skip.") from error
            skipped.append({"file": row.file, "line": row.line, "reason": str(error)})
            continue
        yield record


def _parse(row: RawRow, row_format: RowFormat, split: str, first_seen: dict[str, int]) -> Record:
    if row.error:
        raise DataError(f"row: {row.error}")
    record = parse_row(row.value, row_format, default_id=f"{split}-{row.line}")
    earlier = first_seen.setdefault(record.id, row.line)
    if earlier != row.line:
        name = row_format.fields.id
        raise DataError(f"field {name!r}: {record.id!r} was used at line {earlier}; expected an id of its own.")
    return record


def _hold_out(train: list[Record], config: DataConfig) -> tuple[list[Record], list[Record]]:
    # whole problems: a second chain for a held-out problem must not stay in train
    first_row: dict[str, Record] = {}
    for record in train:
        first_row.setdefault(_normalised(record.problem), record)
    if config.validation_size >= len(first_row):
        raise ConfigError(
            f"data.validation_size: got {config.validation_size}, but train has {len(first_row)} different problems; "
            "expected fewer, so that some remain to train on. Lower it, or give data.validation."
        )
    chosen = set(random.Random(config.split_seed).sample(list(first_row), config.validation_size))
    validation = [record for problem, record in first_row.items() if problem in chosen]
    rest = [record for record in train if _normalised(record.problem) not in chosen]
    logger.info(
        "validation: %d problems split off train (data.split_seed=%d); %d rows remain to train on, %d further rows of "
        "the same problems left out",
        len(validation),
        config.split_seed,
        len(rest),
        len(train) - len(rest) - len(validation),
    )
    return rest, validation


def _warn_of_overlap(train: list[Record], other: list[Record], split: str) -> None:
    known = {_normalised(record.problem) for record in other}
    shared = sum(_normalised(record.problem) in known for record in train)
    if shared:
        logger.warning(
            "contamination: %d of %d train rows have a problem that is also in %s; scores on %s are not held out",
            shared,
            len(train),
            split,
            split,
        )


def _normalised(problem: str) -> str:
    # punctuation stays: `3 + 4` and `3 - 4` are two problems
    return " ".join(problem.casefold().split())


def _describe(source: str, synthetic: SyntheticConfig) -> str:
    if source == SYNTHETIC:
        return f"{SYNTHETIC} {synthetic.task} {fingerprint(synthetic)}"
    return source_fingerprint(source)


def _report_skipped(skipped: list[dict[str, str | int]], path: Path | None) -> None:
    if path is not None and (skipped or path.exists()):
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        first = skipped[0]
        logger.warning(
            "%d bad rows skipped (listed in %s); the first: %s:%s: %s",
            len(skipped),
            path or "no file",
            first["file"],
            first["line"],
            first["reason"],
        )
