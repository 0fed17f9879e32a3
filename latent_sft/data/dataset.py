"""Tokenised splits on disk: made once, memory-mapped, remade when anything that decides them has changed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import DataConfig
from latent_sft.data.formats import Record
from latent_sft.data.prompts import tokenize_record
from latent_sft.data.reading import as_table, what_was_read
from latent_sft.data.records import Splits, normalised
from latent_sft.errors import ArtefactError, DataError
from latent_sft.method.types import LatentSpec
from latent_sft.runs import file_sha256, fingerprint, read_json, write_atomically, write_json

CACHE_FORMAT = 4
META, SKIPPED, READ = "meta.json", "skipped.jsonl", "read.txt"
ROWS_PER_BATCH = 1000

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "hash": pa.string(),  # 16 hex digits of the SHA-256 over prompt, cot, segment_lengths and answer
        "prompt": pa.list_(pa.int32()),  # ends with think_ids
        "cot": pa.list_(pa.int32()),
        "segment_lengths": pa.list_(pa.int32()),  # sums to len(cot)
        "step_lengths": pa.list_(pa.int32()),  # tokens of each step, sums to len(cot); empty: steps are not in the CoT
        "answer": pa.list_(pa.int32()),  # ends with eos_id
        "length": pa.int32(),  # all tokens, for bucketing
        "problem": pa.string(),
        "reference": pa.string(),
        "steps": pa.list_(pa.string()),
        "mixture_ids": pa.list_(
            pa.list_(pa.int32())
        ),  # of each latent step the tokens that are mixed; empty: none given
        "mixture_weights": pa.list_(pa.list_(pa.float32())),  # their masses, which sum to 1
    }
)

WEIGHT = pa.field("weight", pa.float32())  # of train, where its sources have weights: how often an epoch shows the row

logger = logging.getLogger(__name__)


class OnDemand(Mapping[str, Dataset]):
    """Splits by name, each made when it is first asked for.

    Args:
        names: those there are.
        make: name -> split.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Dataset]) -> None:
        self._names, self._make, self._made = list(names), make, dict[str, Dataset]()

    def __getitem__(self, split: str) -> Dataset:
        if split not in self._names:
            raise KeyError(split)
        if split not in self._made:
            self._made[split] = self._make(split)
        return self._made[split]

    def __contains__(self, split: object) -> bool:
        return split in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tokenized_splits(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
    splits: Splits,
    directory: Path,
    max_positions: int | None = None,
    in_turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> OnDemand:
    """Return the tokenised `train`, `validation` and, where there is one, `test` split, each made when asked for.

    Each split is kept in `directory/<split>/` under a fingerprint of its source, tokenizer, spec and limits; while that
    is the same, the source is not read again. Whatever is there with another fingerprint, or damaged, is made again.
    Files appear under their names only when whole, so a killed process or several processes at once leave nothing
    broken.

    A row of validation or test whose reference CoT cannot be used (too long, or it holds `</think>`) has none.
    Problems of train that occur in an evaluation split are counted in a warning when the second of them is made.

    Args:
        data: limits and `on_error` are used.
        tokenizer: of the base model.
        spec: from `latent_sft.data.prompts.build_spec`.
        splits: from `latent_sft.data.records.load_splits`.
        directory: `data/` of the run directory.
        max_positions: of the model; None where it has no bound.
        in_turn: held while a split is made or read, so that one process writes what others read.

    Raises:
        DataError: when a split is asked for: a row that is too long or cannot be tokenised, with `on_error=raise`; no
            row left.
        ArtefactError: the files could not be written.
    """
    limits = (data.max_prompt_tokens, data.max_cot_tokens, data.on_error, max_positions)
    settings = fingerprint(CACHE_FORMAT, spec.to_dict(), tokenizer_fingerprint(tokenizer), limits)
    keys = {split: fingerprint(settings, split, source) for split, source in splits.sources.items()}

    def make(split: str) -> Dataset:
        with in_turn():
            path = _cached(directory / split, keys[split])
            if path is None:
                path = _build(directory / split, keys[split], splits, data, tokenizer, spec, max_positions)
                for other in ("validation", "test") if split == "train" else ("train",):
                    kept = _cached(directory / other, keys[other]) if other in keys else None
                    if kept is not None:
                        _warn_of_overlap({split: _problems(path), other: _problems(kept)})
            return Dataset.from_file(str(path))

    return OnDemand(keys, make)


def skipped_rows(folder: Path) -> dict[str, int]:
    """Return how many rows the split kept in a folder lacks, by reason.

    Raises:
        ArtefactError: missing or damaged file.
    """
    return read_json(folder / META)["skipped"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits over what decides the ids: vocabulary, rules, special tokens and chat template.

    The same for a tokenizer and its saved and loaded copy, wherever they are.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # left over from the last call, not part of the tokenizer
            rules.pop(state, None)
    else:
        rules = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token}
    return fingerprint(rules, special, tokenizer.chat_template)


def _cached(folder: Path, key: str) -> Path | None:
    if not (folder / META).exists():
        return None
    try:
        meta = read_json(folder / META)
        path = folder / meta["file"]
        if meta["key"] != key:
            logger.info("%s: made from other data or settings; tokenising again", folder)
        elif file_sha256(path) != meta["sha256"]:
            logger.warning("%s: damaged; tokenising again", path)
        else:
            return path
    except (ArtefactError, OSError, KeyError, TypeError) as error:
        logger.warning("%s: damaged (%s); tokenising again", folder, error)
    return None


def _build(
    folder: Path,
    key: str,
    splits: Splits,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
    max_positions: int | None,
) -> Path:
    split, path = folder.name, folder / f"{key}.arrow"
    records: list[Record] = getattr(splits, split)
    unread, skipped = splits.skipped.get(split, []), list[dict[str, Any]]()
    bar = tqdm(records, desc=f"tokenising {split}", unit="row", disable=None)
    weights = splits.weights if split == "train" and set(splits.weights) != {1.0} else None
    num_rows = _write(path, _rows(bar, split, data, tokenizer, spec, max_positions, skipped, weights), weights)
    if not num_rows:
        path.unlink()
        raise DataError(f"{split}: all {len(records)} rows were skipped, the first: {skipped[0]['reason']}")
    counts = {"bad row": len(unread), "too long": len(skipped)}
    meta = {"key": key, "file": path.name, "sha256": file_sha256(path), "rows": num_rows}
    skipped = [*unread, *skipped]
    found = what_was_read(splits.read.get(split, []), skipped)
    counted = {reason: count for reason, count in counts.items() if count}
    write_json(folder / META, {**meta, "skipped": counted, "read": found})
    if found:
        logger.info("%s: what was read\n%s", split, table := as_table(found))
        write_atomically(folder / READ, table + "\n")
    if skipped or (folder / SKIPPED).exists():
        write_atomically(folder / SKIPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        logger.warning(
            "%s: %d rows skipped, listed in %s; the first: %s",
            split,
            len(skipped),
            folder / SKIPPED,
            skipped[0]["reason"],
        )
    for old in folder.glob("*.arrow"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _rows(
    records: Iterable[Record],
    split: str,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
    max_positions: int | None,
    skipped: list[dict[str, Any]],
    weights: tuple[float, ...] | None,
) -> Iterator[dict[str, Any]]:
    def checked(record: Record) -> dict[str, Any]:
        row = tokenize_record(tokenizer, spec, record)
        for name, limit in (("prompt", data.max_prompt_tokens), ("cot", data.max_cot_tokens)):
            if len(row[name]) > limit:
                raise DataError(
                    f"row {record.id!r}: {name}: {len(row[name])} tokens; expected at most "
                    f"data.max_{name}_tokens={limit}. Raise it, or leave such rows out: data.on_error=skip."
                )
        # the markers of the encoder take positions too
        needed = row["length"] + len(row["segment_lengths"]) * (spec.marker_positions == "stretched")
        if max_positions is not None and needed > max_positions:
            raise DataError(
                f"row {record.id!r}: {needed} positions (prompt {len(row['prompt'])}, CoT {len(row['cot'])}, answer "
                f"{len(row['answer'])} tokens, delimiters); expected at most {max_positions}, which is what the model "
                "has. Use a model with more (model.tiny.max_positions), or leave such rows out: data.on_error=skip."
            )
        return row

    without_cot = 0
    for record in records:
        try:
            try:
                row = checked(record)
            except DataError:
                if split == "train" or not record.cot:
                    raise
                # a problem can be solved and graded whatever its reference CoT is
                row = {**checked(dataclasses.replace(record, cot="", steps=())), "steps": list(record.steps)}
            without_cot += not row["cot"]
        except DataError as error:
            if data.on_error == "raise":
                raise
            skipped.append({"id": record.id, "reason": str(error), "source": record.source})
            continue
        yield row if weights is None else {**row, "weight": weights[record.source]}
    if without_cot:
        logger.info("%s: %d rows have no CoT that could be used; what needs one leaves them out", split, without_cot)


def _problems(path: Path) -> Iterable[str]:
    return (normalised(problem) for problem in Dataset.from_file(str(path))["problem"])


def _warn_of_overlap(problems: dict[str, Iterable[str]]) -> None:
    train = list(problems.pop("train"))
    ((split, others),) = problems.items()
    known = set(others)
    shared = sum(problem in known for problem in train)
    if shared:
        logger.warning(
            "contamination: %d of %d train rows have a problem that is also in %s; scores on %s are not held out",
            shared,
            len(train),
            split,
            split,
        )


def _write(path: Path, rows: Iterator[dict[str, Any]], weights: tuple[float, ...] | None) -> int:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    num_rows, batch, schema = 0, [], SCHEMA if weights is None else SCHEMA.append(WEIGHT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for row in rows:
                batch.append(row)
                if len(batch) == ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    num_rows, batch = num_rows + len(batch), []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                num_rows += len(batch)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise ArtefactError(
            f"{path}: could not be written ({reason}); make room, or choose another run_dir."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return num_rows
