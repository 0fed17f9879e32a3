"""What a record is, and how each public format spells one. Pure: a decoded row in, a Record or a DataError out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from latent_sft.config.schema import FieldsConfig
from latent_sft.errors import DataError, did_you_mean
from latent_sft.evaluation.answers import extract_answer

EQUATION = re.compile(r"<<[^<>]*>>")
_ONLY_EQUATIONS = re.compile(r"(?:<<[^<>]*>>\s*)+")
_GROUPED_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One problem with its rationale; every text is stripped of surrounding whitespace.

    Attributes:
        id: unique within its split.
        problem: problem text given to the model.
        cot: chain of thought; empty only in evaluation splits.
        cot_answer: text the model writes after `</think>`.
        answer: reference answer for grading.
        steps: steps of the chain of thought, in the order they stand in `cot`.
    """

    id: str
    problem: str
    cot: str
    cot_answer: str
    answer: str
    steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """How rows are read.

    Attributes:
        name: `records`, `gsm8k`, `icot` or `coconut`.
        fields: field names of the `records` format.
        equations: of a `gsm8k` rationale keep only the `<<...>>` steps (GSM8K-Aug style).
        need_cot: an empty chain of thought is an error; evaluation needs problem and answer only.
    """

    name: str
    fields: FieldsConfig
    equations: bool = False
    need_cot: bool = True


def parse_row(value: Any, row_format: RowFormat, *, default_id: str) -> Record:
    """Return the record of a decoded row.

    Args:
        value: JSON value, or a line of text for the `icot` format.
        row_format: how to read it.
        default_id: id of a row that has none.

    Raises:
        DataError: `field 'x': what is wrong; expected y.`, without the place, which the caller knows.
    """
    parse = {"records": _records, "gsm8k": _gsm8k, "icot": _icot, "coconut": _coconut}[row_format.name]
    return parse(value, row_format, default_id)


def split_steps(cot: str) -> tuple[str, ...]:
    """Return the steps of a chain of thought: its `<<...>>` equations where it is nothing else, else its lines.

    >>> split_steps("<<16-3=13>> <<13*2=26>>")
    ('<<16-3=13>>', '<<13*2=26>>')
    """
    if _ONLY_EQUATIONS.fullmatch(cot):
        return tuple(EQUATION.findall(cot))
    return tuple(line.strip() for line in cot.splitlines() if line.strip())


def _records(value: Any, row_format: RowFormat, default_id: str) -> Record:
    row, names = _object(value), row_format.fields
    steps = _steps(row, names.steps) if row.get(names.steps) else ()
    if steps and row.get(names.cot) is None:
        cot = "\n".join(steps)
    elif row_format.need_cot or row.get(names.cot) is not None:
        cot = _text(row, names.cot, required=row_format.need_cot)
    else:
        cot = ""
    written = _text(row, names.cot_answer, number=True) if row.get(names.cot_answer) is not None else None
    # published rows have one text for both: what the model writes, with the answer to grade in a box
    answer = extract_answer(written or "") if row.get(names.answer) is None else ""
    answer = answer or _text(row, names.answer, number=True)
    return Record(
        id=_text(row, names.id, number=True) if row.get(names.id) is not None else default_id,
        problem=_text(row, names.problem),
        cot=cot,
        cot_answer=answer if written is None else written,
        answer=answer,
        steps=steps or split_steps(cot),
    )


def _gsm8k(value: Any, row_format: RowFormat, default_id: str) -> Record:
    row = _object(value)
    rationale, separator, answer = _text(row, "answer").rpartition("####")
    if not separator:
        raise DataError("field 'answer': no '####'; expected 'rationale #### answer'.")
    cot = " ".join(EQUATION.findall(rationale)) if row_format.equations else EQUATION.sub("", rationale)
    what = "no <<...>> step before '####'" if row_format.equations else "nothing before '####'"
    return _record(default_id, _text(row, "question"), cot, answer, row_format, field="answer", what=what)


def _icot(value: Any, row_format: RowFormat, default_id: str) -> Record:
    if not isinstance(value, str):
        raise DataError(f"row: got {type(value).__name__}; expected a line 'problem||steps #### answer'.")
    problem, bars, rest = value.partition("||")
    cot, separator, answer = rest.rpartition("####")
    if not bars or not separator:
        missing = "||" if not bars else "####"
        raise DataError(f"row: no {missing!r}; expected 'problem||steps #### answer' (is the line cut off?).")
    if not problem.strip():
        raise DataError("field 'problem': empty; expected text before '||'.")
    return _record(default_id, problem, cot, answer, row_format, field="steps", what="nothing between '||' and '####'")


def _coconut(value: Any, row_format: RowFormat, default_id: str) -> Record:
    row = _object(value)
    steps = _steps(row, "steps") if row_format.need_cot or row.get("steps") else ()
    answer = _number(_text(row, "answer", number=True))
    return Record(
        id=default_id,
        problem=_text(row, "question"),
        cot="\n".join(steps),
        cot_answer=answer,
        answer=answer,
        steps=steps,
    )


def _record(
    row_id: str, problem: str, cot: str, answer: str, row_format: RowFormat, *, field: str, what: str
) -> Record:
    cot, answer = "\n".join(line.strip() for line in cot.strip().splitlines()), _number(answer.strip())
    if not cot and row_format.need_cot:
        raise DataError(f"field {field!r}: empty chain of thought ({what}); expected at least one step.")
    if not answer:
        raise DataError("field 'answer': empty; expected an answer after '####'.")
    return Record(id=row_id, problem=problem.strip(), cot=cot, cot_answer=answer, answer=answer, steps=split_steps(cot))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"row: got {type(value).__name__}; expected a JSON object.")
    return value


def _text(row: dict[str, Any], field: str, *, required: bool = True, number: bool = False) -> str:
    expected = "a text or a number" if number else "a text"
    if field not in row:
        raise DataError(f"field {field!r}: missing; expected {expected}.{did_you_mean(field, row)}")
    value = row[field]
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"field {field!r}: got {type(value).__name__} {value!r:.60}; expected {expected}.")
    if required and not value.strip():
        raise DataError(f"field {field!r}: empty; expected {expected}.")
    return value.strip()


def _steps(row: dict[str, Any], field: str) -> tuple[str, ...]:
    if field not in row:
        raise DataError(f"field {field!r}: missing; expected a list of texts.{did_you_mean(field, row)}")
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(step, str) for step in value):
        raise DataError(f"field {field!r}: got {type(value).__name__} {value!r:.60}; expected a list of texts.")
    if not value or not all(step.strip() for step in value):
        raise DataError(f"field {field!r}: empty list or empty step; expected a list of non-empty texts.")
    return tuple(step.strip() for step in value)


def _number(text: str) -> str:
    # GSM8K writes thousands separators in answers but never in the equations that lead to them
    return text.replace(",", "") if _GROUPED_NUMBER.fullmatch(text) else text
