"""Train, validation and test records from the sources of a configuration, every row validated."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from latent_sft.config.schema import DataConfig, SourceConfig
from latent_sft.data import mnns
from latent_sft.data.detect import detect, parse_row
from latent_sft.data.formats import Record, RowFormat
from latent_sft.data.readers import RawRow, read_rows, source_fingerprint
from latent_sft.data.shorten import shortened
from latent_sft.data.synthetic import generate
from latent_sft.errors import ConfigError, DataError
from latent_sft.runs import fingerprint

__all__ = ["Record", "Splits", "load_splits", "normalised"]

SYNTHETIC = "synthetic"
READING = 1  # raise it when the same source gives other rows than before
# settings of a format that came later; runs made before had their defaults
_LATER = {"think_tags": ("<think>", "</think>"), "boxed": False}

logger = logging.getLogger(__name__)


class Splits:
    """The data of an experiment. A split is read, every row validated, when it is first asked for.

    A row of train needs a chain of thought; validation and test rows need only problem and answer. `data.shorten` cuts
    the chains of all splits, and of a validation or test row where it does not apply drops the chain. Where no
    validation source is given, whole problems are held out of train (`validation_size`, `split_seed`), before
    `limit_train`, so that experiments with other limits validate on the same problems; train is then read to its end,
    else as far as its limit.

    Attributes:
        sources: by split (those there are) what it is made from: SHA-256 of the file, or a description, and how its
            rows are read. No row is read for it.
        validation_from_train: whether validation is split off train, for want of a source.
        skipped: by split, as far as they have been read, the bad rows left out (`data.on_error=skip`): `file`, `line`,
            `reason`, `source`.
        read: by split, as far as they have been read, what was found in each file of it: `source`, `format`, `weight`,
            `rows`, bad ones included, and `held_out` for validation.
    """

    def __init__(self, config: DataConfig) -> None:
        if config.test == SYNTHETIC != config.train and config.validation != SYNTHETIC:
            raise ConfigError(
                f"data.test: got 'synthetic' while data.train is {config.train!r}; expected a source of the same task. "
                "Give one, `data.test=` for none, or data.validation=synthetic too, where the rows are of that task."
            )
        self._config = config
        validation = config.validation or (SYNTHETIC if config.train == SYNTHETIC else "")
        self._given = {
            split: given if isinstance(given, tuple) else (SourceConfig(path=given),) if given != SYNTHETIC else given
            for split, given in (("train", config.train), ("validation", validation), ("test", config.test))
            if given
        }
        self.validation_from_train = not validation
        self.skipped: dict[str, list[dict[str, Any]]] = {}
        self.read: dict[str, list[dict[str, Any]]] = {}
        self._most_steps = 0  # of a row of train, before it was shortened
        self._limits = {
            "train": config.limit_train,
            "validation": config.limit_validation,
            "test": config.limit_test,
        }
        described = {split: self._describe(split) for split in self._given}
        if self.validation_from_train:
            held_out = f"{config.validation_size} problems, split_seed {config.split_seed}"
            described["validation"] = f"{held_out}, of {described['train']}"
            described["train"] += f", without {held_out}"
        self.sources = {
            split: text + (f", the first {limit}" if (limit := self._limits[split]) else "")
            for split, text in described.items()
        }

    @property
    def weights(self) -> tuple[float, ...]:
        """How often an epoch shows each training row of a source, by the number of the source."""
        given = self._given["train"]
        return (1.0,) if given == SYNTHETIC else tuple(source.weight for source in given)

    @cached_property
    def train(self) -> list[Record]:
        """Rows to learn from, each with a chain of thought."""
        return list(_first(self._train_and_held_out[0], self._limits["train"]))

    @cached_property
    def validation(self) -> list[Record]:
        """Rows to choose checkpoints on."""
        if not self.validation_from_train:
            return self._read("validation", self._limits["validation"])
        return self._train_and_held_out[1][: self._limits["validation"] or None]

    @cached_property
    def test(self) -> list[Record]:
        """Rows to report on; may be empty."""
        return self._read("test", self._limits["test"]) if "test" in self._given else []

    @property
    def words(self) -> tuple[str, ...]:
        """Words that a vocabulary built from the training text needs beside it."""
        generated = self._config.train == SYNTHETIC and self._config.synthetic.task == "mnns"
        return mnns.WORDS if generated else ()

    @cached_property
    def _train_and_held_out(self) -> tuple[list[Record], list[Record]]:
        if not self.validation_from_train:
            return self._read("train", self._limits["train"]), []
        train, held_out = _hold_out(self._read("train", 0), self._config)
        kept = Counter(record.source for record in train)
        for number, found in enumerate(self.read.get("train", ())):
            found["held_out"] = found["rows"] - found["bad"] - kept[number]
        return train, held_out

    @cached_property
    def _generated(self) -> dict[str, list[Record]]:
        without = (row.problem for split in self._without for row in self._records(split, [], []))
        return generate(self._config.synthetic, without)

    @property
    def _without(self) -> list[str]:
        # public files of a task that is generated too: what is tested must not have been trained on
        given = [split for split, sources in self._given.items() if sources != SYNTHETIC]
        return given if self._config.synthetic.task == "multiplication" else []

    def _read(self, split: str, limit: int) -> list[Record]:
        if self._given[split] == SYNTHETIC:
            generated = self._generated[split][: limit or None]
            try:
                records = [self._shortened(record, split) for record in generated]
            except DataError as error:
                raise DataError(f"{SYNTHETIC} {self._config.synthetic.task}: {error}") from error
        else:
            skipped, read = self.skipped.setdefault(split, []), self.read.setdefault(split, [])
            records = list(self._records(split, skipped, read, limit))
            for number, found in enumerate(read):
                if not any(record.source == number for record in records):
                    bad = [row for row in skipped if row["source"] == number]
                    first = f" The first of {len(bad)} bad ones: {bad[0]['reason']}" if bad else ""
                    place = found["source"]
                    raise DataError(f"{place}: no usable rows; expected at least one for {split}.{first}")
        if split == "train":
            self._check_shortened(records)
        return records

    def _shortened(self, record: Record, split: str) -> Record:
        if split == "train":
            self._most_steps = max(self._most_steps, len(record.steps))
        try:
            return shortened(record, self._config.shorten)
        except DataError:
            if split == "train":
                raise
            return dataclasses.replace(record, cot="", steps=())  # a problem can be solved and graded without

    def _check_shortened(self, records: list[Record]) -> None:
        rule, steps = self._config.shorten.rule, self._config.shorten.steps
        if rule in ("drop_left", "every_r") and self._most_steps < 2:
            raise ConfigError(
                f"data.shorten.rule: got {rule!r}, but no CoT of train has two steps; expected some that can be told "
                "apart. Set data.step_separator to what stands between them, or give data.fields.steps."
            )
        if not any(record.cot for record in records):
            raise ConfigError(
                f"data.shorten.steps: got {steps}, which leaves nothing of any CoT of train (the longest has "
                f"{self._most_steps} steps); expected fewer. Without any CoT trains the no-cot stage."
            )

    def _records(
        self, split: str, skipped: list[dict[str, Any]], read: list[dict[str, Any]], limit: int = 0
    ) -> Iterator[Record]:
        several = len(self._given[split]) > 1
        for number, source in enumerate(self._given[split]):
            found = {"source": source.path, "format": "", "weight": source.weight, "rows": 0, "bad": 0}
            read.append(found)
            for record in islice(self._records_of(split, source, found, skipped, number), limit or None):
                name = f"{number + 1}/{record.id}" if several else record.id  # ids are of their file
                yield dataclasses.replace(record, id=name, source=number)

    def _records_of(
        self, split: str, source: SourceConfig, found: dict[str, Any], skipped: list[dict[str, Any]], number: int
    ) -> Iterator[Record]:
        row_format, first_seen = self._row_format(split, source), dict[str, int]()
        for row in read_rows(source.path):
            if row_format.name == "auto" and not row.error:
                try:
                    row_format = dataclasses.replace(row_format, name=detect(row.value, row_format))
                except DataError as error:
                    raise DataError(f"{row.where}: {error}") from error
                logger.info("%s: read as %s", source.path, row_format.name)
            found["format"], found["rows"] = row_format.name, found["rows"] + 1
            try:
                record = self._shortened(_parse(row, row_format, split, first_seen), split)
            except DataError as error:
                if self._config.on_error == "raise":
                    raise DataError(
                        f"{row.where}: {error} Fix it, or leave such rows out: data.on_error=skip."
                    ) from error
                found["bad"] += 1
                skipped.append({"file": row.file, "line": row.line, "reason": str(error), "source": number})
                continue
            yield record

    def _row_format(self, split: str, source: SourceConfig) -> RowFormat:
        config = self._config
        other_names = {} if split == "train" else getattr(config, f"{split}_fields")
        other_format = "" if split == "train" else getattr(config, f"{split}_format")
        return RowFormat(
            name=source.format or other_format or config.format,
            fields=dataclasses.replace(config.fields, **other_names, **source.fields),
            equations=config.cot_style == "equations",
            need_cot=split == "train",
            step_separator=config.step_separator,
            think_tags=config.think_tags,
            boxed=config.answer_style == "boxed",
        )

    def _describe(self, split: str) -> str:
        shorten, given = self._config.shorten, self._given[split]
        cut = f"; shortened {fingerprint(shorten)}" if shorten.rule != "none" else ""
        if given == SYNTHETIC:
            made = f"{SYNTHETIC} {self._config.synthetic.task} {fingerprint(READING, self._config.synthetic)}"
            without = [self._describe(other) for other in self._without]
            return made + (f", without the problems of {fingerprint(without)}" if without else "") + cut
        described = []
        for source in given:
            settings = dataclasses.asdict(self._row_format(split, source))
            settings = {key: value for key, value in settings.items() if key not in _LATER or value != _LATER[key]}
            weight = f"{source.weight:g} x " if source.weight != 1 or len(given) > 1 else ""
            described.append(f"{weight}{source_fingerprint(source.path)}; rows {fingerprint(READING, settings)}")
        return " + ".join(described) + cut


def load_splits(config: DataConfig) -> Splits:
    """Return the splits of a configuration; their rows are read when they are first asked for.

    Raises:
        DataError: a source is missing or cannot be read; later, a bad row (`file:line: field ...`) with
            `on_error=raise`, a damaged source, a split without rows.
        ConfigError: sources that do not fit together.
    """
    return Splits(config)


def _parse(row: RawRow, row_format: RowFormat, split: str, first_seen: dict[str, int]) -> Record:
    if row.error:
        raise DataError(f"row: {row.error}")
    record = parse_row(row.value, row_format, default_id=f"{split}-{row.line}")
    earlier = first_seen.setdefault(record.id, row.line)
    if earlier != row.line:
        name = row_format.fields.id
        raise DataError(f"field {name!r}: {record.id!r} was used at line {earlier}; expected an id of its own.")
    return record


def _first(records: Iterable[Record], limit: int) -> Iterator[Record]:
    # of every source, as where they are read no further
    seen: Counter[int] = Counter()
    for record in records:
        seen[record.source] += 1
        if not limit or seen[record.source] <= limit:
            yield record


def _hold_out(train: list[Record], config: DataConfig) -> tuple[list[Record], list[Record]]:
    # whole problems: a second chain for a held-out problem must not stay in train
    first_row: dict[str, Record] = {}
    for record in train:
        first_row.setdefault(normalised(record.problem), record)
    if config.validation_size >= len(first_row):
        raise ConfigError(
            f"data.validation_size: got {config.validation_size}, but train has {len(first_row)} different problems; "
            "expected fewer, so that some remain to train on. Lower it, or give data.validation."
        )
    chosen = set(random.Random(config.split_seed).sample(list(first_row), config.validation_size))
    validation = [record for problem, record in first_row.items() if problem in chosen]
    rest = [record for record in train if normalised(record.problem) not in chosen]
    logger.info(
        "validation: %d problems split off train (data.split_seed=%d); %d rows remain to train on, %d further rows of "
        "the same problems left out",
        len(validation),
        config.split_seed,
        len(rest),
        len(train) - len(rest) - len(validation),
    )
    return rest, validation


def normalised(problem: str) -> str:
    """Return what two texts of the same problem have in common."""
    # punctuation stays: `3 + 4` and `3 - 4` are two problems
    return " ".join(problem.casefold().split())
