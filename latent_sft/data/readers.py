"""Rows of a source, with the place each one stands at. Knows files and `datasets`; knows nothing of field names."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import urlopen

import pyarrow as pa

from latent_sft.errors import ArtefactError, ConfigError, DataError
from latent_sft.runs import file_sha256, fingerprint, read_json, write_atomically

HUB, URL = "hub:", ("https://", "http://")
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

    What may have lost rows without a trace (a broken compressed or Arrow file, NUL bytes) is refused as a whole.

    Args:
        source: path of a JSONL, JSON (list of objects), Parquet or TXT file (the text ones also gzipped), folder
            written by `datasets.Dataset.save_to_disk`, `hub:NAME[@REVISION][:CONFIG]:SPLIT`, or the URL of a file,
            which is fetched once.

    Raises:
        DataError: the source is missing, cannot be read, or is damaged as a whole.
        ConfigError: the name is none of the above.
    """
    with _readable(source):
        if source.startswith(HUB):
            yield from _numbered(source, _hub_dataset(source))
            return
        path = _existing(source)
        if path.is_dir():
            yield from _arrow_rows(source, _saved_batches(path))
        elif source.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        elif source.endswith((".txt", ".txt.gz")):
            yield from _lines(path)
        elif source.endswith(".json"):
            yield from map(_valid, _numbered(source, _json_list(path)))
        else:
            yield from _arrow_rows(source, _parquet_batches(path))


def source_fingerprint(source: str) -> str:
    """Return what identifies the content of a source, without decoding it: the SHA-256 of its file or files.

    Raises:
        DataError, ConfigError: as `read_rows`.
    """
    with _readable(source):
        if source.startswith(HUB):
            return f"{source} {_hub_dataset(source)._fingerprint}"
        path = _existing(source)
        if path.is_dir():
            return fingerprint([(file.name, file_sha256(file)) for file in _saved_files(path)])
        return file_sha256(path)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, reason = error.filename or source, error.strerror or error
        raise DataError(f"{where}: cannot be read ({reason}); expected a file or folder that you may read.") from error


def _existing(source: str) -> Path:
    path = _fetched(source) if source.startswith(URL) else Path(source)
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{source}: no such file or folder; expected {', '.join(SUFFIXES)} or hub:NAME[:CONFIG]:SPLIT.")
    if path.is_file() and not source.endswith(SUFFIXES):
        raise ConfigError(f"data: {source!r} has no known suffix; expected {', '.join(SUFFIXES)}.")
    return path


def _fetched(url: str) -> Path:
    """Return the local copy of a file, in the cache of `datasets`."""
    from datasets.config import HF_DATASETS_CACHE

    path = Path(HF_DATASETS_CACHE, "latent_sft", fingerprint(url), url.rpartition("/")[2])
    if not path.exists():
        try:
            with urlopen(url, timeout=30) as answer:
                content = answer.read()
        except (OSError, HTTPException) as error:
            raise DataError(
                f"{url}: could not be fetched ({error}); without network, download it elsewhere and give the path."
            ) from error
        write_atomically(path, content)
    return path


def _numbered(source: str, values: Iterable[Any]) -> Iterator[RawRow]:
    return (RawRow(file=source, line=number, value=value) for number, value in enumerate(values, start=1))


def _lines(path: Path) -> Iterator[RawRow]:
    # lines are decoded one by one, so that a bad byte or a cut end costs one row and not the file
    number = 0
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, start=1):
                if b"\0" in line:
                    raise DataError(
                        f"{path}:{number}: NUL bytes; expected UTF-8 text. The file was not written whole, or is "
                        "UTF-16: fetch it again, or convert it."
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield RawRow(file=str(path), line=number, error=f"not UTF-8 ({error.reason}); expected UTF-8 text.")
                    continue
                if text.strip():
                    yield RawRow(file=str(path), line=number, value=text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        # how many rows are lost nobody can say
        raise DataError(
            f"{path}:{number + 1}: gzip data ends or breaks here ({error}); expected a whole file. Fetch it again."
        ) from error


def _json_lines(path: Path) -> Iterator[RawRow]:
    for row in _lines(path):
        if row.error:
            yield row
            continue
        try:
            found = replace(row, value=json.loads(row.value))
            yield _valid(found) if "\\u" in row.value else found
        except (ValueError, RecursionError) as error:
            reason = f"{_no_json(error)}; expected one JSON object a line (is the line cut off?)."
            yield replace(row, value=None, error=reason)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _json_list(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); expected UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        # lines of a list are not rows: nothing can be skipped
        raise DataError(
            f"{path}:{getattr(error, 'lineno', 1)}: {_no_json(error)}; expected a list of objects. Is the file cut "
            "off? Fetch it again."
        ) from error
    if not isinstance(values, list):
        raise DataError(f"{path}:1: got {type(values).__name__}; expected a list of objects (or use .jsonl).")
    return values


def _no_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg})"
    return f"a number too long to read (more than {sys.get_int_max_str_digits()} digits: write it as a text)"


def _valid(row: RawRow) -> RawRow:
    # an escaped half of a surrogate pair is JSON, but no text: no tokenizer takes it and no file can hold it
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except RecursionError as error:
        return replace(row, value=None, error=f"{_no_json(error)}; expected one JSON object.")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        return replace(row, value=None, error=f"{found} stands alone, half a character; expected valid Unicode.")
    return row


def _saved_files(path: Path) -> list[Path]:
    """Return the Arrow files of a folder that `datasets` saved, in order."""
    if (path / "dataset_dict.json").is_file():
        found = sorted(state.parent for state in path.glob("*/state.json"))
        raise DataError(
            f"{path}: holds the splits {', '.join(p.name for p in found)}; expected one. Give its folder, for example "
            f"{found[0] if found else path / 'train'}."
        )
    state = path / "state.json"
    if not state.is_file():
        raise DataError(f"{path}: not a folder written by Dataset.save_to_disk (no state.json).")
    try:
        return [path / file["filename"] for file in read_json(state)["_data_files"]]
    except (ArtefactError, KeyError, TypeError) as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(f"{state}: cannot be read ({error.__cause__.strerror}).") from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{state}: damaged ({reason}); expected the names of the Arrow files under "
            "'_data_files'. Save or fetch the data set again."
        ) from error


def _saved_batches(path: Path) -> Iterator[pa.RecordBatch]:
    for file in _saved_files(path):
        with pa.OSFile(str(file)) as handle, pa.ipc.open_stream(handle) as batches:
            yield from batches


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches()


def _arrow_rows(source: str, batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    # Arrow believes what a file says about lengths and offsets, and a wrong one ends the process. So nothing is
    # memory-mapped (as `datasets` does it), and each batch is checked before it is touched.
    number, damaged = 0, (pa.ArrowException, OSError, ValueError, OverflowError)
    try:
        for batch in batches:
            batch.validate(full=True)
            try:
                values = batch.to_pylist()
            except damaged:
                values = None  # a date that Python cannot hold, say: find the row
            for index in range(batch.num_rows):
                number += 1
                try:
                    value = values[index] if values else batch.slice(index, 1).to_pylist()[0]
                except damaged as error:
                    reason = f"holds what cannot be read ({error}); expected texts, numbers and lists of them."
                    yield RawRow(file=source, line=number, error=reason)
                    continue
                yield RawRow(file=source, line=number, value=value)
    except damaged as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the file, not what is in it
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: damaged behind row {number} ({reason}); expected whole Arrow or Parquet data, texts in UTF-8. "
            "Fetch or write it again."
        ) from error


def _hub_dataset(source: str) -> Any:
    parts = source.removeprefix(HUB).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"data: {source!r}; expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT.")
    from datasets import load_dataset

    try:
        name, _, revision = parts[0].partition("@")
        pinned = {"revision": revision} if revision else {}
        return load_dataset(name, parts[1] if len(parts) == 3 else None, split=parts[-1], **pinned)
    except Exception as error:  # the library raises many kinds; each means that this source cannot be had
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: `datasets` could not load it ({reason}). Check name and split; without network, "
            "download it elsewhere and give the path of the file."
        ) from error
