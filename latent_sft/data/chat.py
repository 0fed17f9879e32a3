"""Rows of chat and reasoning models: conversations, prompts with completions, and the shapes of well-known public sets.

The thought stands between tags in the last turn of the assistant, or in a field of its own; the answer is what follows.
Pure, as `data.formats`.
"""

from __future__ import annotations

import reprlib
from dataclasses import replace
from typing import Any, NamedTuple

from latent_sft.data.formats import Record, RowFormat, as_object, id_of, split_steps, text_of
from latent_sft.errors import DataError, did_you_mean
from latent_sft.evaluation.answers import extract_answer

ROLES = {"human": "user", "gpt": "assistant", "developer": "system"} | {r: r for r in ("system", "user", "assistant")}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
NO_ANSWER = ("proof", "notfound")  # NuminaMath 1.5 writes these where a problem has none


class Turn(NamedTuple):
    """One message: who says it, its text, and its thought where that has a field of its own."""

    role: str
    text: str
    thought: str = ""


def messages(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `messages` of role and content, or ShareGPT's `conversations` of from and value."""
    row = as_object(value)
    field = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    return _conversation(row, field, _turns(row, field), row_format, default_id)


def prompt_completion(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `prompt` and `completion`, each a text or a list of messages; evaluation rows need no completion."""
    row = as_object(value)
    turns = _turns(row, "prompt", "user")
    if row_format.need_cot or row.get("completion") is not None:
        turns += _turns(row, "completion", "assistant")
    return _conversation(row, "completion", turns, row_format, default_id)


def openr1(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read the first of `generations` that is complete and was verified, as OpenR1-Math rows list them."""
    row = as_object(value)
    written = row.get("generations")
    if not isinstance(written, list) or not all(isinstance(text, str) for text in written):
        found = f"{type(written).__name__} {reprlib.repr(written)}"
        raise DataError(f"field 'generations': got {found}; expected a list of texts.")
    complete, *checks = (
        row.get(name) or [] for name in ("is_reasoning_complete", "correctness_math_verify", "correctness_llama")
    )
    right = (
        text
        for at, text in enumerate(written)
        if (not complete or complete[at : at + 1] == [True]) and any(c[at : at + 1] == [True] for c in checks)
    )
    thought, answer = _split(next(right, ""), row_format, "generations")
    if not thought and row_format.need_cot:
        raise DataError("field 'generations': none is complete and verified; expected one that is.")
    return _record(row, text_of(row, "problem"), thought, answer or None, row_format, row.get("uuid") or default_id)


def numina(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `problem` and `solution`: the solution is the CoT, and the answer is in its last box, or in `answer`."""
    row = as_object(value)
    given = row.get(row_format.fields.answer)
    if given is None or (isinstance(given, str) and given.strip() in ("", *NO_ANSWER)):
        solution = text_of(row, "solution")
        if "\\boxed{" not in solution:
            raise DataError("field 'solution': no \\boxed{} and no 'answer'; expected the final answer in one of them.")
        row = {**row, row_format.fields.answer: extract_answer(solution)}
    thought = text_of(row, "solution") if row_format.need_cot or row.get("solution") else ""
    return _record(row, text_of(row, "problem"), thought, None, row_format, default_id)


def s1k(value: Any, row_format: RowFormat, default_id: str) -> Record:
    """Read `question`, `solution` and a trajectory with its attempt, as s1K and s1K-1.1 name them.

    Whether the attempt was graded right is not looked at: the published models were trained on all rows.
    """
    row = as_object(value)
    if row.get("deepseek_thinking_trajectory"):
        thought, attempt = text_of(row, "deepseek_thinking_trajectory"), text_of(row, "deepseek_attempt")
    else:
        parts = row.get("thinking_trajectories") or []
        parts = [parts] if isinstance(parts, str) else parts
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"field 'thinking_trajectories': got {reprlib.repr(parts)}; expected a list of texts.")
        thought, attempt = "\n".join(parts).strip(), text_of(row, "attempt")
    solution = text_of(row, "solution")
    if "\\boxed{" not in solution and "\\boxed{" in attempt and len(solution.split()) > 1:
        solution = attempt  # prose without a box cannot be compared
    row = {row_format.fields.answer: extract_answer(solution), **row}
    return _record(row, text_of(row, "question"), thought, attempt, row_format, default_id)


def _conversation(row: dict[str, Any], field: str, turns: list[Turn], row_format: RowFormat, default_id: str) -> Record:
    *asked, last = turns
    thought, written = "", None
    if last.role == "assistant":
        inside, written = _split(last.text, row_format, field)
        thought = last.thought or inside
    elif row_format.need_cot:
        raise DataError(f"field {field!r}: the last turn is of {last.role!r}; expected the assistant's answer.")
    else:
        asked = turns
    if not asked or asked[-1].role != "user":
        raise DataError(f"field {field!r}: no turn of the user before the answer; expected the problem there.")
    # earlier thoughts are left out, as the chat templates of reasoning models do
    said = [(t.role, _split(t.text, row_format, field)[1] if t.role == "assistant" else t.text) for t in asked]
    alone = [role for role, _ in said].count("user") == 1 and "assistant" not in dict(said)
    problem = said[-1][1] if alone else "\n".join(f"{role}: {text}" for role, text in said)
    record = _record(row, problem, thought, written, row_format, default_id, field)
    return replace(record, turns=tuple(said)) if len(said) > 1 else record


def _record(
    row: dict[str, Any],
    problem: str,
    thought: str,
    written: str | None,
    row_format: RowFormat,
    default_id: str,
    field: str = "",
) -> Record:
    if not thought and row_format.need_cot:
        opening, closing = row_format.think_tags
        raise DataError(
            f"{f'field {field!r}' if field else 'row'}: no thought; expected it between {opening!r} and {closing!r} "
            f"(data.think_tags) in the assistant's last turn, or as its {' or '.join(map(repr, THOUGHTS[:2]))}."
        )
    name = row_format.fields.answer
    answer = text_of(row, name, number=True) if row.get(name) is not None else extract_answer(written or "")
    if not answer or (row_format.need_cot and written == ""):
        raise DataError(f"field {field or name!r}: nothing behind the thought; expected the answer there.")
    return Record(
        id=id_of(row, row_format.fields.id, default_id),
        problem=problem,
        cot=thought,
        cot_answer=written or answer,
        answer=answer,
        steps=split_steps(thought, row_format.step_separator),
    )


def _turns(row: dict[str, Any], field: str, role: str = "") -> list[Turn]:
    if field not in row:
        raise DataError(f"field {field!r}: missing; expected a list of messages.{did_you_mean(field, row)}")
    value = row[field]
    if role and isinstance(value, str):
        return [Turn(role, text_of(row, field))]
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field!r}: got {reprlib.repr(value)}; expected a list of messages.")
    return [_turn(message, f"field {field!r}: message {number}") for number, message in enumerate(value, 1)]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where}: got {type(message).__name__}; expected an object with 'role' and 'content'.")
    said = message.get("role", message.get("from"))
    if said not in ROLES:
        raise DataError(f"{where}: role {said!r}; expected one of {', '.join(ROLES)}.")
    text = message.get("content", message.get("value"))
    if isinstance(text, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in text):
        text = "".join(part["text"] for part in text)
    thought = next((message[name] for name in THOUGHTS if message.get(name)), "")
    if not isinstance(text, str) or not isinstance(thought, str) or not text.strip():
        raise DataError(f"{where}: got {reprlib.repr(text)}; expected a text as its content.")
    return Turn(ROLES[said], text.strip(), thought.strip())


def _split(text: str, row_format: RowFormat, field: str) -> tuple[str, str]:
    """Return the thought in a text, empty where there is none, and what follows it."""
    opening, closing = row_format.think_tags
    before, closed, after = text.partition(closing)
    ahead, opened, inside = before.partition(opening)
    if not closed and not opened:
        return "", text.strip()
    if not closed:
        raise DataError(f"field {field!r}: {opening!r} is never closed; expected {closing!r} (is the text cut off?).")
    if opened and ahead.strip():
        raise DataError(f"field {field!r}: {ahead.strip()!r:.60} stands before {opening!r}; expected nothing there.")
    return (inside if opened else ahead).strip(), after.strip()
