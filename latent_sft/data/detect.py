"""Every format of a row: how it is read, and by which fields it is recognised (`data.format=auto`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from latent_sft.config.schema import FieldsConfig
from latent_sft.data import chat, formats
from latent_sft.data.formats import Record, RowFormat
from latent_sft.errors import DataError
from latent_sft.evaluation.answers import extract_answer

PARSERS: dict[str, Callable[[Any, RowFormat, str], Record]] = {
    "records": formats.records,
    "openr1": chat.openr1,
    "s1k": chat.s1k,
    "numina": chat.numina,
    "messages": chat.messages,
    "prompt": chat.prompt_completion,
    "steps": formats.question_steps,
    "gsm8k": formats.gsm8k,
    "lines": formats.lines,
}
# the first that fits counts: public sets carry the fields of others along
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "openr1": (("problem", "generations"),),
    "s1k": (("question", "thinking_trajectories"), ("question", "deepseek_thinking_trajectory")),
    "numina": (("problem", "solution"),),
    "messages": (("messages",), ("conversations",)),
    "prompt": (("prompt", "completion"), ("prompt", "answer")),
    "steps": (("question", "steps", "answer"),),
    "gsm8k": (("question", "answer"),),
}


def parse_row(value: Any, row_format: RowFormat, *, default_id: str) -> Record:
    """Return the record of a decoded row.

    Args:
        value: JSON value, or a line of text for the `lines` format.
        row_format: how to read it, by a name of PARSERS.
        default_id: id of a row that has none.

    Raises:
        DataError: `field 'x': what is wrong; expected y.`, without the place, which the caller knows.
    """
    record = PARSERS[row_format.name](value, row_format, default_id)
    if row_format.boxed and record.cot_answer != record.answer:
        boxed = "\\boxed{" in record.cot_answer
        record = replace(record, cot_answer=extract_answer(record.cot_answer) if boxed else record.answer)
    return record


def detect(value: Any, row_format: RowFormat) -> str:
    """Return the format of a source by its first row.

    Raises:
        DataError: none fits; says which fields there are.
    """
    if isinstance(value, str):
        return "lines"
    found = {name for name, content in value.items() if content is not None} if isinstance(value, dict) else set()
    shapes = {"records": _own(row_format.fields, row_format.need_cot), **_FIELDS}
    for name, alternatives in shapes.items():
        if any(found.issuperset(fields) for fields in alternatives):
            return name
    known = "; ".join(f"{name} ({' or '.join('+'.join(f) for f in alts)})" for name, alts in shapes.items())
    has = f"fields {', '.join(sorted(found))}" if found else f"no fields ({type(value).__name__})"
    raise DataError(
        f"row: {has}; no format has these. Expected those of one of: {known}. Name the fields "
        "(data.fields.problem=..., data.fields.cot=...), or the format (data.format)."
    )


def _own(names: FieldsConfig, need_cot: bool) -> tuple[tuple[str, ...], ...]:
    if need_cot:
        return (names.problem, names.cot), (names.problem, names.steps)
    return (names.problem, names.cot), (names.problem, names.answer), (names.problem, names.cot_answer)
