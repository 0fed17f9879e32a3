"""Tokenised splits on disk: made once, memory-mapped, remade when anything that decides them has changed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import DataConfig
from latent_sft.data.formats import Record
from latent_sft.data.prompts import tokenize_record
from latent_sft.data.records import Splits, content_hash
from latent_sft.errors import ArtefactError, DataError
from latent_sft.method.types import LatentSpec
from latent_sft.runs import file_sha256, fingerprint, read_json, write_atomically, write_json

CACHE_FORMAT = 2
META, SKIPPED = "meta.json", "skipped.jsonl"
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
    }
)

logger = logging.getLogger(__name__)


def tokenized_splits(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, splits: Splits, directory: Path
) -> dict[str, Dataset]:
    """Return the tokenised `train`, `validation` and, where there is one, `test` split.

    Each split is kept in `directory/<split>/` under a fingerprint of the records, tokenizer, spec and limits. Whatever
    is there with another fingerprint, or damaged, is made again. Files appear under their names only when whole, so a
    killed process or several processes at once leave nothing broken.

    Args:
        data: limits and `on_error` are used.
        tokenizer: of the base model.
        spec: from `latent_sft.data.prompts.build_spec`.
        splits: from `latent_sft.data.records.load_splits`.
        directory: `data/` of the run directory.

    Raises:
        DataError: a row that is too long or cannot be tokenised, with `on_error=raise`; no row left.
        ArtefactError: the files could not be written.
    """
    limits = (data.max_prompt_tokens, data.max_cot_tokens, data.on_error)
    settings = fingerprint(CACHE_FORMAT, spec.to_dict(), tokenizer_fingerprint(tokenizer), limits)
    datasets: dict[str, Dataset] = {}
    for split in ("train", "validation", "test"):
        records: list[Record] = getattr(splits, split)
        if not records:
            continue
        folder = directory / split
        key = fingerprint(settings, content_hash(records))
        path = _cached(folder, key)
        if path is None:
            path = _build(folder, key, split, records, data, tokenizer, spec)
        datasets[split] = Dataset.from_file(str(path))
    return datasets


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
    split: str,
    records: list[Record],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
) -> Path:
    skipped: list[dict[str, str]] = []
    path = folder / f"{key}.arrow"
    rows = _rows(tqdm(records, desc=f"tokenising {split}", unit="row", disable=None), data, tokenizer, spec, skipped)
    num_rows = _write(path, rows)
    if not num_rows:
        path.unlink()
        raise DataError(f"{split}: all {len(records)} rows were skipped, the first: {skipped[0]['reason']}")
    write_json(folder / META, {"key": key, "file": path.name, "sha256": file_sha256(path), "rows": num_rows})
    if skipped or (folder / SKIPPED).exists():
        write_atomically(folder / SKIPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    if skipped:
        logger.warning("%s: %d rows skipped, listed in %s", split, len(skipped), folder / SKIPPED)
    for old in folder.glob("*.arrow"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _rows(
    records: Iterator[Record] | tqdm[Record],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
    skipped: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    for record in records:
        try:
            row = tokenize_record(tokenizer, spec, record)
            for name, limit in (("prompt", data.max_prompt_tokens), ("cot", data.max_cot_tokens)):
                if len(row[name]) > limit:
                    raise DataError(
                        f"row {record.id!r}: {name}: {len(row[name])} tokens; expected at most "
                        f"data.max_{name}_tokens={limit}. Raise it, or leave such rows out: data.on_error=skip."
                    )
        except DataError as error:
            if data.on_error == "raise":
                raise
            skipped.append({"id": record.id, "reason": str(error)})
            continue
        yield row


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    num_rows, batch = 0, []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for row in rows:
                batch.append(row)
                if len(batch) == ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                    num_rows, batch = num_rows + len(batch), []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
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
