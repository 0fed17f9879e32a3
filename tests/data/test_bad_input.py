"""Input that nobody should have, in one table: each case is one message with its place, and never a traceback."""

from __future__ import annotations

import datetime
import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from latent_sft import cli
from latent_sft.config.schema import DataConfig
from latent_sft.data.readers import read_rows, source_fingerprint
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError, DataError

GOOD = {"problem": "2 + 3", "cot": "5", "answer": "5"}
DEEP, LONG = "[" * 10_000, "9" * 5_000


def changed(**values: Any) -> str:
    return json.dumps({**GOOD, **values})


# the second line of a JSONL file -> what is said about it
LINES: dict[str, tuple[str | bytes, str]] = {
    "cut": (json.dumps(GOOD)[:-5], "not valid JSON"),
    "a word": ("hello", "not valid JSON"),
    "single quotes": (str(GOOD), "not valid JSON"),
    "trailing comma": (json.dumps(GOOD)[:-1] + ",}", "not valid JSON"),
    "two objects": (json.dumps(GOOD) * 2, "not valid JSON"),
    "a comment": ("// nothing", "not valid JSON"),
    "a control character": ('{"problem": "a\x01b"}', "not valid JSON"),
    "a BOM": ("\ufeff" + json.dumps(GOOD), "not valid JSON"),
    "nested deeply": (DEEP, "nested too deeply"),
    "a field nested deeply": ('{"problem": ' + DEEP + "}", "nested too deeply"),
    "a field nested less deeply": (changed(problem=7).replace("7", "[" * 700 + "]" * 700), "field 'problem': got list"),
    "an object nested deeply": ('{"a":' * 10_000, "nested too deeply"),
    "an integer of 5,000 digits": ('{"problem": "p", "cot": "c", "answer": ' + LONG + "}", "number too long to read"),
    "a negative one": ('{"answer": -' + LONG + "}", "number too long to read"),
    "not UTF-8": (b'{"problem": "\xff"}', "not UTF-8"),
    "half a character": (b'{"problem": "\xc3"}', "not UTF-8"),
    "an overlong code": (b'{"problem": "\xc0\x80"}', "not UTF-8"),
    "an encoded surrogate": (b'{"problem": "\xed\xa0\x80"}', "not UTF-8"),
    "a lone surrogate": (changed(problem="a\ud800"), r"\\ud800 stands alone"),
    "a low surrogate": (changed(problem="\udc00a"), r"\\udc00 stands alone"),
    "one in the CoT": (changed(cot="\ud83d"), r"\\ud83d stands alone"),
    "one in the answer": (changed(answer="\ud800"), "stands alone"),
    "one in the id": (changed(id="\ud800"), "stands alone"),
    "one in a step": (changed(steps=["\ud800"]), "stands alone"),
    "one in a name": (changed(**{"prob\ud800": 1}), "stands alone"),
    "a number": ("3", "row: got int"),
    "a text": ('"text"', "row: got str"),
    "null": ("null", "row: got NoneType"),
    "a boolean": ("true", "row: got bool"),
    "a list": ("[1, 2]", "row: got list"),
    "no field": ("{}", "field '\\w+': missing"),
    "no problem": ('{"cot": "c", "answer": "1"}', "field 'problem': missing"),
    "no CoT": ('{"problem": "p", "answer": "1"}', "field 'cot': missing"),
    "no answer": ('{"problem": "p", "cot": "c"}', "field 'answer': missing"),
    "a name misspelt": ('{"problem": "p", "cot": "c", "anwser": "1"}', r"Did you mean 'anwser'\?"),
    **{f"{name} is {kind}": (changed(**{name: value}), f"field '{name}'")
       for name in ("problem", "cot", "answer")
       for kind, value in {"empty": "", "space": " \t", "null": None, "a list": ["5"], "an object": {"a": 1},
                           "a boolean": True}.items()},
    "the answer is NaN": (changed(answer=float("nan")), "field 'answer': got float nan"),
    "the answer is infinite": (changed(answer=float("inf")), "field 'answer': got float inf"),
    "the answer is too large": ('{"problem": "p", "cot": "c", "answer": 1e999}', "field 'answer': got float inf"),
    "the id is a list": (changed(id=[1]), "field 'id': got list"),
    "the id is empty": (changed(id=""), "field 'id': empty"),
    "the id is used": (changed(id="train-1"), "field 'id': 'train-1' was used at line 1"),
    "the answer text is a list": (changed(cot_answer=[1]), "field 'cot_answer': got list"),
    "steps are a text": (changed(steps="5"), "field 'steps': got str"),
    "steps are numbers": (changed(steps=[5]), "field 'steps': got list"),
    "a step is empty": (changed(steps=["5", " "]), "field 'steps': empty list or empty step"),
}  # fmt: skip

JSONL = "".join(json.dumps({**GOOD, "problem": f"{i} + {i}"}) + "\n" for i in range(500)).encode()
GZ = gzip.compress(JSONL)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


# name of the file -> content -> what is said about the file as a whole
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "no usable rows"),
    "empty lines": ("a.jsonl", b"\n \n\n", "no usable rows"),
    "NUL at the end": ("a.jsonl", JSONL + b"\0" * 9, r"a\.jsonl:501: NUL bytes"),
    "NUL in the middle": ("a.jsonl", JSONL[:5000] + b"\0" * 4096 + JSONL[9096:], r"a\.jsonl:\d+: NUL bytes"),
    "NUL in a text file": ("a.txt", b"p||1 #### 2\n\0\0\0\np||1 #### 2\n", r"a\.txt:2: NUL bytes"),
    "NUL inside of a line": ("a.txt", b"p||1 #### 2\np|\0|1 #### 2\n", r"a\.txt:2: NUL bytes"),
    "UTF-16": ("a.jsonl", JSONL.decode().encode("utf-16"), r"a\.jsonl:1: NUL bytes.*is UTF-16"),
    "gzip cut early": ("a.jsonl.gz", GZ[:5], r"a\.jsonl\.gz:1: gzip data ends"),
    "gzip cut in the middle": ("a.jsonl.gz", GZ[: len(GZ) // 2], r"a\.jsonl\.gz:\d+: gzip data ends"),
    "gzip cut at the end": ("a.jsonl.gz", GZ[:-1], r"a\.jsonl\.gz:\d+: gzip data ends"),
    "gzip with NUL": ("a.jsonl.gz", GZ[:300] + b"\0" * 300 + GZ[600:], r"a\.jsonl\.gz:\d+: gzip data ends or breaks"),
    "gzip flipped": ("a.jsonl.gz", flipped(GZ, len(GZ) // 2), r"a\.jsonl\.gz:\d+: "),
    "gzip with another sum": ("a.jsonl.gz", flipped(GZ, len(GZ) - 6), r"a\.jsonl\.gz:501: gzip data .*CRC"),
    "gzip and something": ("a.jsonl.gz", GZ + b"something", r"a\.jsonl\.gz:501: gzip data"),
    "no gzip": ("a.txt.gz", b"p||1 #### 2", r"a\.txt\.gz:1: gzip data"),
    "JSON cut": ("a.json", b'[{"problem": "p"', r"a\.json:1: not valid JSON"),
    "JSON empty": ("a.json", b"", r"a\.json:1: not valid JSON"),
    "JSON of one object": ("a.json", b"{}", r"a\.json:1: got dict"),
    "JSON null": ("a.json", b"null", r"a\.json:1: got NoneType"),
    "JSON without rows": ("a.json", b"[]", "no usable rows"),
    "JSON nested": ("a.json", DEEP.encode(), r"a\.json:1: nested too deeply"),
    "JSON with a long number": ("a.json", f"[{LONG}]".encode(), r"a\.json:1: a number too long"),
    "JSON not UTF-8": ("a.json", b'["\xff"]', r"a\.json: not UTF-8"),
    "JSON with NUL": ("a.json", b'["a\0b"]', r"a\.json:1: not valid JSON"),
    "JSON of JSONL": ("a.json", JSONL, r"a\.json:2: not valid JSON"),
    "JSON with a surrogate": ("a.json", b'[{"problem": "\\ud800"}]', r"a\.json:1: row: \\ud800 stands alone"),
    "Parquet empty": ("a.parquet", b"", r"a\.parquet: damaged behind row 0"),
    "Parquet of text": ("a.parquet", JSONL, r"a\.parquet: damaged behind row 0"),
    "no suffix": ("a", JSONL, "no known suffix"),
    "another suffix": ("a.csv", JSONL, "no known suffix"),
}


def table(**columns: Any) -> pa.Table:
    rows = 3
    return pa.table({"problem": ["p"] * rows, "cot": ["c"] * rows, "answer": ["1"] * rows, **columns})


def text(*values: bytes) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


TABLES: dict[str, tuple[pa.Table, str]] = {
    "no rows": (table().slice(0, 0), "no usable rows"),
    "no columns": (table().select([]), "no usable rows|field 'problem': missing|field 'cot': missing"),
    "not UTF-8": (table(problem=text(b"p", b"\xff\xfe", b"p")), "damaged behind row 0 .*UTF8"),
    "a surrogate": (table(cot=text(b"p", b"p", b"\xed\xa0\x80")), "damaged behind row 0 .*UTF8"),
    "a date beyond": (table(when=pa.array([0, 2**62, 0], pa.timestamp("ms"))), ":2: row: holds what cannot be read"),
    "a day beyond": (table(when=pa.array([2**31 - 1, 0, 0], pa.date32())), ":1: row: holds what cannot be read"),
    "bytes": (table(problem=pa.array([b"p"] * 3, pa.binary())), ":1: field 'problem': got bytes"),
    "a date": (table(answer=pa.array([datetime.date(2020, 1, 1)] * 3)), ":1: field 'answer': got date"),
    "nulls": (table(cot=pa.nulls(3)), ":1: field 'cot': got NoneType"),
    "NaN": (table(answer=pa.array([1.0, float("nan"), 2.0])), ":2: field 'answer': got float nan"),
}


def saved(folder: Path, made: pa.Table) -> Path:
    Dataset(made.replace_schema_metadata()).save_to_disk(str(folder)) if made.num_columns else folder.mkdir()
    arrow = folder / "data-00000-of-00001.arrow"
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": arrow.name}]}))
    return folder


# what stands in state.json
STATES = {
    "cut": '{"_data_files": [',
    "empty": "",
    "a list": "[]",
    "null": "null",
    "nothing": "{}",
    "no list": '{"_data_files": 3}',
    "null for a list": '{"_data_files": null}',
    "numbers": '{"_data_files": [1]}',
    "no name": '{"_data_files": [{}]}',
    "a number for a name": '{"_data_files": [{"filename": 1}]}',
    "nested": DEEP,
    "a long number": LONG,
}

PATHS = {
    "missing": ("nowhere.jsonl", "no such file or folder"),
    "a name too long": ("x" * 300 + ".jsonl", "name too long"),
    "a path too long": ("x/" * 3000 + "a.jsonl", "name too long"),
    "a folder of a file": ("file.jsonl/a.jsonl", "no such file or folder"),
    "no Hub name": ("hub:", "expected hub:NAME"),
    "half a Hub name": ("hub:name", "expected hub:NAME"),
    "more than a Hub name": ("hub:a:b:c:d", "expected hub:NAME"),
}


def check(source: Path | str, message: str, **settings: Any) -> None:
    config = DataConfig(train=str(source), validation=str(source), test="", **settings)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        _ = load_splits(config).train
    assert str(source)[:40] in str(caught.value) or "hub:" in str(caught.value)


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_and_can_be_skipped(name: str, tmp_path: Path) -> None:
    line, message = LINES[name]
    path, good = tmp_path / "a.jsonl", json.dumps(GOOD).encode()
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([good, content, good]))
    check(path, rf"a\.jsonl:2: .*{message}.*data\.on_error=skip\.$")
    splits = load_splits(DataConfig(train=str(path), validation=str(path), test="", on_error="skip"))
    assert len(splits.train) == 2
    json.dumps(splits.skipped, ensure_ascii=False).encode()  # as they are listed


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_damaged_as_a_whole_is_refused_however_bad_rows_are_treated(
    name: str, on_error: str, tmp_path: Path
) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    whole = message if on_error == "raise" else f"{message}|no usable rows"
    check(tmp_path / file, whole, on_error=on_error, format="lines" if ".txt" in file else "records")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_holds_what_is_no_text(name: str, kind: str, tmp_path: Path) -> None:
    made, message = TABLES[name]
    path = tmp_path / "a.parquet"
    if kind == "parquet":
        pq.write_table(made, path)
    else:
        path = saved(tmp_path / "a", made)
    check(path, message)


@pytest.mark.parametrize("name", STATES)
def test_a_saved_data_set_with_a_damaged_state(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", table())
    (folder / "state.json").write_text(STATES[name])
    check(folder, r"a/state\.json: damaged .*expected the names of the Arrow files.*(Save or fetch|again)")


def test_a_saved_data_set_without_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"problem": []}).save_to_disk(str(tmp_path / "a"))  # has no Arrow file
    check(tmp_path / "a", "no usable rows; expected at least one for train")


def test_a_saved_data_set_with_files_missing_or_cut(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", table())
    (arrow,) = folder.glob("*.arrow")
    content = arrow.read_bytes()
    for size in (0, 1, 8, 100, len(content) // 2, len(content) - 60):
        arrow.write_bytes(content[:size])
        check(folder, "damaged behind row 0|no usable rows")
    arrow.unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: cannot be read \(No such file or directory\)"):
        load_splits(DataConfig(train=str(folder), validation=str(folder), test=""))
    (folder / "state.json").unlink()
    check(folder, r"not a folder written by Dataset\.save_to_disk \(no state\.json\)")
    (folder / "dataset_dict.json").write_text("{}")
    shutil.copytree(saved(tmp_path / "b", table()), folder / "test")
    check(folder, "holds the splits test; expected one. Give its folder, for example .*a/test")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_leads_nowhere(name: str, tmp_path: Path) -> None:
    path, message = PATHS[name]
    (tmp_path / "file.jsonl").write_bytes(JSONL)
    check(path if path.startswith("hub:") else tmp_path / path, f"(?i){message}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_file_that_may_not_be_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{kind}"
    path = saved(tmp_path / "a", table()) if kind == "saved" else path
    if kind == "jsonl":
        path.write_bytes(JSONL)
    elif kind == "parquet":
        pq.write_table(table(), path)
    real = open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    monkeypatch.setattr("io.open", refuse)
    check(path, "cannot be read.*Permission denied")


# the same through the command line


@pytest.mark.parametrize(
    ("setting", "status"),
    [
        ("data.train=nowhere.jsonl", 2),
        ("data.train=" + "x" * 300 + ".jsonl", 2),
        ("run_dir=" + "x" * 300, 2),
        ("run_dir=/dev/null/x", 2),
        ("data.limit_train=" + LONG, 2),
        ("data.limit_train=-1", 2),
        ("data.step_separator=", 2),
        ("seed=" + DEEP, 2),
    ],
)
def test_the_command_line_ends_with_one_message_and_status_2(
    setting: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "no-cot", "quickstart", "data.test=", "data.synthetic.num_train=20", setting]
    assert cli.main(words) == status
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 1 and "Traceback" not in shown and "--debug" not in shown


# flipped bytes


def flips(
    content: bytes, count: int, write: Callable[[bytes], object], source: str, seed: int
) -> tuple[int, int, list[str]]:
    """Return how many damaged copies were read as before, otherwise, and what was said about the rest."""
    rng, before, same, other, said = random.Random(seed), list(read_rows(source)), 0, 0, []
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 4))):
            damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        write(bytes(damaged))
        try:
            source_fingerprint(source)
            found = list(read_rows(source))
        except (DataError, ConfigError) as error:
            said.append(str(error))
            continue
        same, other = same + (found == before), other + (found != before)
    return same, other, said


@pytest.mark.parametrize(
    "count", [pytest.param(400, id="some"), pytest.param(5_000, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl.gz", "state.json"])
def test_flipped_bytes_are_an_error_or_change_a_row_and_never_end_the_process(
    kind: str, count: int, tmp_path: Path
) -> None:
    rows = [{"problem": f"é {i}", "cot": "c" * i or None, "answer": i, "steps": ["a", f"{i}"]} for i in range(20)]
    made, path = pa.Table.from_pylist(rows), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(made, path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        path = saved(tmp_path / "a", made)
    file = path if path.is_file() else next(path.glob("*.arrow" if kind == "saved" else "state.json"))
    same, other, said = flips(file.read_bytes(), count, file.write_bytes, str(path), seed=0)
    assert same + other + len(said) == count
    assert len(said) > count // 5, "most of such a file is structure"
    assert all(re.search(r"damaged|cannot be read|gzip data|no folder|row 0|not ", message) for message in said)
