"""What a record is, and how plain formats spell one. Pure: a decoded row in, a Record or a DataError out.

Conversations and rows of reasoning models are in `data.chat`; which format a row has is in `data.detect`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
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
        cot: chain of thought; empty only in evaluation splits, and where `data.shorten` left nothing.
        cot_answer: text the model writes after `</think>`.
        answer: reference answer for grading.
        steps: steps of the chain of thought, in the order they stand in `cot`.
        mixtures: of each latent step the masses of its tokens, by their texts; empty where the row has none.
        turns: role and text of the turns before the answer, where they are more than one of the user; `problem` then
            says the same as one text.
        source: which of the sources of its split it came from, from 0.
    """

    id: str
    problem: str
    cot: str
    cot_answer: str
    answer: str
    steps: tuple[str, ...]
    mixtures: tuple[dict[str, float], ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    source: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    r"""How rows are read.

    Attributes:
        name: a format of `data.detect`, or `auto`.
        fields: field names of the `records` format; other formats have `id` and `answer` from it, where a row has them.
        equations: of a `gsm8k` rationale keep only the `<<...>>` steps (GSM8K-Aug style).
        need_cot: an empty or unusable chain of thought is an error; evaluation needs problem and answer only.
        step_separator: where a chain of thought is cut into steps, if the row does not list them.
        think_tags: what stands around the thought in the text of a reasoning model.
        boxed: of the text behind the thought the model writes only what is in its last `\boxed{}`.
    """

    name: str
    fields: FieldsConfig
    equations: bool = False
    need_cot: bool = True
    step_separator: str = "\n"
    think_tags: tuple[str, str] = ("<think>", "</think>")
    boxed: bool = False


def split_steps(cot: str, separator: str = "\n") -> tuple[str, ...]:
    """Return the steps of a chain of thought, each with the separator behind it, so that they are the whole text.

    Space around a step is left out. Where lines are asked for and the text is nothing but `<<...>>` equations, these
    are the steps.

    >>> split_steps("<<16-3=13>> <<13*2=26>>")
    ('<<16-3=13>>', '<<13*2=26>>')
    >>> split_steps("16-3=13; 13*2=26", ";")
    ('16-3=13;', '13*2=26')
    """
    if separator == "\n" and _ONLY_EQUATIONS.fullmatch(cot):
        return tuple(EQUATION.findall(cot))
    parts = cot.splitlines(keepends=True) if separator == "\n" else cot.split(separator)
    if separator != "\n":
        parts = [*(part + separator for part in parts[:-1]), parts[-1]]
    return tuple(part.strip() for part in parts if part.strip())


def step_starts(cot: str, steps: Sequence[str]) -> list[int]:
    """Return where each step begins in its chain of thought.

    Raises:
        DataError: a step is not in it behind the ones before; without the row, and without a full stop, so that the
            caller can say what the steps are needed for.
    """
    starts, position = [], 0
    for step in steps:
        start = cot.find(step, position)
        if start < 0:
            raise DataError(
                f"field 'steps': {step!r:.80} is not in `cot` after the steps before it; expected the steps in the "
                "order of `cot`"
            )
        starts.append(start)
        position = start + len(step)
    return starts


def records(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read the project's own format, field names as configured."""
    row, names = as_object(value), row_format.fields
    cot, steps = _reasoning(row, names.cot, names.steps, row_format)
    written = text_of(row, names.cot_answer, number=True) if row.get(names.cot_answer) is not None else None
    # published rows have one text for both: what the model writes, with the answer to grade in a box
    answer = extract_answer(written or "") if row.get(names.answer) is None else ""
    answer = answer or text_of(row, names.answer, number=True)
    return Record(
        id=id_of(row, names.id, default_id),
        problem=text_of(row, names.problem),
        cot=cot,
        cot_answer=answer if written is None else written,
        answer=answer,
        steps=steps,
        mixtures=_mixtures(row, names.mixtures) if row_format.need_cot and row.get(names.mixtures) is not None else (),
    )


def _reasoning(row: dict[str, Any], cot: str | None, steps: str, row_format: RowFormat) -> tuple[str, tuple[str, ...]]:
    """Return text and steps of the fields `cot` (None: steps only) and `steps`; nothing where none is needed."""
    try:
        listed = _steps(row, steps) if cot is None or row.get(steps) else ()
        text = "\n".join(listed) if cot is None or (listed and row.get(cot) is None) else text_of(row, cot)
    except DataError:
        if row_format.need_cot:
            raise
        return "", ()
    return text, listed or split_steps(text, row_format.step_separator)


def gsm8k(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `question`, `answer` with its rationale before `####`."""
    row = as_object(value)
    rationale, separator, answer = text_of(row, "answer").rpartition("####")
    if not separator:
        raise DataError("field 'answer': no '####'; expected 'rationale #### answer'.")
    cot = " ".join(EQUATION.findall(rationale)) if row_format.equations else EQUATION.sub("", rationale)
    what = "no <<...>> step before '####'" if row_format.equations else "nothing before '####'"
    return _record(default_id, text_of(row, "question"), cot, answer, row_format, field="answer", what=what)


def lines(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read a line `problem||steps #### answer`."""
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


def question_steps(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `question`, `steps`, `answer`."""
    row = as_object(value)
    cot, steps = _reasoning(row, None, "steps", row_format)
    answer = _number(text_of(row, "answer", number=True))
    return Record(
        id=default_id,
        problem=text_of(row, "question"),
        cot=cot,
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
    steps = split_steps(cot, row_format.step_separator)
    return Record(id=row_id, problem=problem.strip(), cot=cot, cot_answer=answer, answer=answer, steps=steps)


def as_object(value: Any) -> dict[str, Any]:
    """Return a row that is an object.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, dict):
        raise DataError(f"row: got {type(value).__name__}; expected a JSON object.")
    return value


def id_of(row: dict[str, Any], field: str, default_id: str) -> str:
    """Return the id that a row has, or the one that is its place."""
    return text_of(row, field, number=True) if row.get(field) is not None else default_id


def text_of(row: dict[str, Any], field: str, *, required: bool = True, number: bool = False) -> str:
    """Return the stripped text of a field, a number written out where one may stand there.

    Raises:
        DataError: it is missing, empty or something else.
    """
    expected = "a text or a number" if number else "a text"
    if field not in row:
        raise DataError(f"field {field!r}: missing; expected {expected}.{did_you_mean(field, row)}")
    value = row[field]
    # neither NaN nor infinity minus itself is 0
    if number and isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0:
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"field {field!r}: got {type(value).__name__} {reprlib.repr(value)}; expected {expected}.")
    if required and not value.strip():
        raise DataError(f"field {field!r}: empty; expected {expected}.")
    return value.strip()


def _steps(row: dict[str, Any], field: str) -> tuple[str, ...]:
    if field not in row:
        raise DataError(f"field {field!r}: missing; expected a list of texts.{did_you_mean(field, row)}")
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(step, str) for step in value):
        raise DataError(f"field {field!r}: got {type(value).__name__} {reprlib.repr(value)}; expected a list of texts.")
    if not value or not all(step.strip() for step in value):
        raise DataError(f"field {field!r}: empty list or empty step; expected a list of non-empty texts.")
    return tuple(step.strip() for step in value)


def _mixtures(row: dict[str, Any], field: str) -> tuple[dict[str, float], ...]:
    value = row[field]
    if not isinstance(value, list) or not value or not all(isinstance(step, dict) and step for step in value):
        expected = "a list with an object {token: mass} for each step"
        raise DataError(f"field {field!r}: got {type(value).__name__} {reprlib.repr(value)}; expected {expected}.")
    for number, step in enumerate(value, 1):
        for text, mass in step.items():
            if isinstance(mass, bool) or not isinstance(mass, int | float) or not mass > 0:
                raise DataError(f"field {field!r}: step {number}: {text!r} has {mass!r}; expected a mass > 0.")
        if not abs(sum(step.values()) - 1) < 1e-4:
            total = sum(step.values())
            raise DataError(f"field {field!r}: step {number}: its masses sum to {total:.6g}; expected 1.")
    return tuple({text: float(mass) for text, mass in step.items()} for step in value)


def _number(text: str) -> str:
    # GSM8K writes thousands separators in answers but never in the equations that lead to them
    return text.replace(",", "") if _GROUPED_NUMBER.fullmatch(text) else text
