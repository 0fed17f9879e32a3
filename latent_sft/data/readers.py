"""Rows of a source, with the place each one stands at. Knows files and `datasets`; knows nothing of field names."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from latent_sft.errors import ConfigError, DataError
from latent_sft.runs import file_sha256

HUB = "hub:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".txt", ".txt.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as the source has it.

    Attributes:
        file: source it came from.
        line: line of a text file, else number of the row; the first is 1.
        value: decoded JSON value, or the line of a `.txt` file.
        error: why the row could not be decoded; empty where it could.
    """

    file: str
    line: int
    value: Any = None
    error: str = ""

    @property
    def where(self) -> str:
        """`file:line`, as error messages begin."""
        return f"{self.file}:{self.line}"


def read_rows(source: str) -> Iterator[RawRow]:
    """Yield the rows of a source; a row that cannot be decoded is yielded with its `error`, not raised.

    Args:
        source: path of a JSONL, JSON (list of objects), Parquet or TXT file (the text ones also gzipped), folder
            written by `datasets.Dataset.save_to_disk`, or `hub:NAME[:CONFIG]:SPLIT`.

    Raises:
        DataError: the source is missing or damaged as a whole.
        ConfigError: the name is none of the above.
    """
    if source.startswith(HUB):
        return _numbered(source, _hub_dataset(source))
    path = Path(source)
    if path.is_dir():
        return _numbered(source, _local_dataset(path))
    if not path.is_file():
        raise DataError(f"{source}: no such file or folder; expected {', '.join(SUFFIXES)} or hub:NAME[:CONFIG]:SPLIT.")
    if source.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if source.endswith((".txt", ".txt.gz")):
        return _lines(path)
    if source.endswith(".json"):
        return _numbered(source, _json_list(path))
    if source.endswith(".parquet"):
        return _numbered(source, _parquet(path))
    raise ConfigError(f"data: {source!r} has no known suffix; expected {', '.join(SUFFIXES)}.")


def source_fingerprint(source: str) -> str:
    """Return what identifies the content of a source: the SHA-256 of a file, the fingerprint of a dataset."""
    if source.startswith(HUB):
        return f"{source} {_hub_dataset(source)._fingerprint}"
    path = Path(source)
    return _local_dataset(path)._fingerprint if path.is_dir() else file_sha256(path)


def _numbered(source: str, values: Iterable[Any]) -> Iterator[RawRow]:
    return (RawRow(file=source, line=number, value=value) for number, value in enumerate(values, start=1))


def _lines(path: Path) -> Iterator[RawRow]:
    # lines are decoded one by one, so that a bad byte or a cut end costs one row and not the file
    number = 0
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield RawRow(file=str(path), line=number, error=f"not UTF-8 ({error.reason}); expected UTF-8 text.")
                    continue
                if text.strip():
                    yield RawRow(file=str(path), line=number, value=text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"gzip data ends or breaks here ({error}); expected a whole file."
        yield RawRow(file=str(path), line=number + 1, error=reason)


def _json_lines(path: Path) -> Iterator[RawRow]:
    for row in _lines(path):
        if row.error:
            yield row
            continue
        try:
            yield RawRow(file=row.file, line=row.line, value=json.loads(row.value))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"not valid JSON ({error}); expected one JSON object a line (is the line cut off?)."
            yield RawRow(file=row.file, line=row.line, error=reason)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _json_list(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        # lines of a list are not rows: nothing can be skipped
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); expected a list of objects. Is the file cut off? "
            "Fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); expected UTF-8 text.") from error
    if not isinstance(values, list):
        raise DataError(f"{path}:1: got {type(values).__name__}; expected a list of objects (or use .jsonl).")
    return values


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Fetch or write it again.") from error


def _local_dataset(path: Path) -> Any:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder written by Dataset.save_to_disk ({error}).") from error
    if not isinstance(loaded, Dataset):
        raise DataError(
            f"{path}: holds the splits {', '.join(loaded)}; expected one. Give its folder, for example "
            f"{path / next(iter(loaded))}."
        )
    return loaded


def _hub_dataset(source: str) -> Any:
    parts = source.removeprefix(HUB).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"data: {source!r}; expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT.")
    from datasets import load_dataset

    try:
        return load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=parts[-1])
    except Exception as error:  # the library raises many kinds; each means that this source cannot be had
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: `datasets` could not load it ({reason}). Check name and split; without network, "
            "download it elsewhere and give the path of the file."
        ) from error
