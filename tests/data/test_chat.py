"""Chat rows and public reasoning sets: what each shape becomes, what is refused, and how a format is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_sft.config.schema import DataConfig, FieldsConfig, LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.detect import detect, parse_row
from latent_sft.data.formats import Record, RowFormat
from latent_sft.data.prompts import build_spec, render_prompt, tokenize_record
from latent_sft.data.records import load_splits
from latent_sft.errors import DataError
from latent_sft.models.tiny_tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "2+3?"}
REPLY = {"role": "assistant", "content": "<think>\n2 + 3 = 5\n</think>\n\nIt is \\boxed{5}."}
OPENR1 = {
    "problem": "2+3?",
    "solution": "five",
    "answer": "5",
    "uuid": "u-1",
    "is_reasoning_complete": [True, False, True],
    "generations": [f"<think>\n{t}\n</think>\n\nSo \\boxed{{5}}" for t in ("wrong", "cut", "2 + 3 = 5")],
    "correctness_math_verify": [False, True, True],
    "correctness_llama": None,
    "messages": [ASK, {"role": "assistant", "content": "no thought here"}],
}
NUMINA = {
    "source": "synthetic_math",
    "problem": "2+3?",
    "solution": "We add.\nThe sum is $\\boxed{5}$.",
    "messages": [ASK, {"role": "assistant", "content": "We add.\nThe sum is $\\boxed{5}$."}],
}
S1K = {
    "question": "2+3?",
    "solution": "The sum of two and three.",
    "cot": None,
    "thinking_trajectories": ["2 + 3 = 5"],
    "attempt": "It is \\boxed{5}.",
}
S1K_11 = {
    "question": "2+3?",
    "solution": "5",
    "deepseek_thinking_trajectory": "2 + 3 = 5",
    "deepseek_attempt": "It is 5.",
}


def row_format(name: str = "auto", **changes: Any) -> RowFormat:
    return RowFormat(**{"name": name, "fields": FieldsConfig(), **changes})


def read(row: Any, **changes: Any) -> Record:
    given = row_format(**changes)
    return parse_row(row, row_format(detect(row, given), **changes), default_id="x")


def of(cot: str, cot_answer: str, answer: str, **more: Any) -> Record:
    values = {"id": "x", "problem": "2+3?", "steps": tuple(cot.splitlines()), **more}
    return Record(cot=cot, cot_answer=cot_answer, answer=answer, **values)


PLAIN = of("2 + 3 = 5", "It is \\boxed{5}.", "5")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASK, REPLY]}, PLAIN),
        ({"messages": [ASK, {**REPLY, "content": REPLY["content"].removeprefix("<think>")}]}, PLAIN),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": "It is \\boxed{5}.", "reasoning_content": " 2 + 3 = 5 "},
                ]
            },
            PLAIN,
        ),
        ({"messages": [ASK, {"role": "assistant", "content": "It is \\boxed{5}.", "thinking": "2 + 3 = 5"}]}, PLAIN),
        ({"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": REPLY["content"]}]}, PLAIN),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": "2+3?"}]}, REPLY]}, PLAIN),
        ({"prompt": "2+3?", "completion": REPLY["content"]}, PLAIN),
        ({"prompt": [ASK], "completion": [REPLY]}, PLAIN),
        ({"messages": [ASK, REPLY], "id": 7, "answer": 5.0}, of("2 + 3 = 5", "It is \\boxed{5}.", "5.0", id="7")),
        (OPENR1, of("2 + 3 = 5", "So \\boxed{5}", "5", id="u-1")),
        (NUMINA, of("We add.\nThe sum is $\\boxed{5}$.", "5", "5")),
        ({**NUMINA, "answer": "proof"}, of("We add.\nThe sum is $\\boxed{5}$.", "5", "5")),
        (S1K, PLAIN),
        (S1K_11, of("2 + 3 = 5", "It is 5.", "5")),
    ],
)
def test_what_a_row_becomes(row: dict[str, Any], expected: Record) -> None:
    assert read(row) == expected


def test_the_answer_alone_and_other_tags() -> None:
    row = {"messages": [ASK, {**REPLY, "content": "<r>2 + 3 = 5</r> It is \\boxed{5}."}]}
    assert read(row, think_tags=("<r>", "</r>"), boxed=True) == of("2 + 3 = 5", "5", "5")
    assert read(S1K_11, boxed=True).cot_answer == "5"  # no box: the reference


def test_turns_before_the_answer_are_the_prompt() -> None:
    earlier = [{"role": "system", "content": "Be brief."}, ASK, REPLY]
    row = {
        "messages": [
            *earlier,
            {"role": "user", "content": "And 4 more?"},
            {**REPLY, "content": "<think>5 + 4</think>9"},
        ]
    }
    found = read(row)
    turns = (("system", "Be brief."), ("user", "2+3?"), ("assistant", "It is \\boxed{5}."), ("user", "And 4 more?"))
    assert (found.turns, found.cot, found.answer) == (turns, "5 + 4", "9")
    assert found.problem == "system: Be brief.\nuser: 2+3?\nassistant: It is \\boxed{5}.\nuser: And 4 more?"
    alone = read({"messages": [earlier[0], ASK, REPLY]})
    assert (alone.problem, alone.turns) == ("2+3?", (("system", "Be brief."), ("user", "2+3?")))

    tokenizer = build_tokenizer(["system user"], TinyModelConfig(tokenizer="bpe", vocab_size=300), PromptConfig())
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    configured = PromptConfig(template="chat", system="Not this one.", system_placement="system")
    spec = build_spec(tokenizer, configured, LatentConfig(), len(tokenizer))
    prompt = tokenizer.decode(tokenize_record(tokenizer, spec, found)["prompt"])
    said = [{"role": role, "content": text} for role, text in turns]
    assert prompt == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + "<think>"
    # without a system turn of its own the configured one stands in front
    ids = render_prompt(tokenizer, spec, "", turns[1:])
    said[0]["content"] = "Not this one."
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + (
        "<think>"
    )
    plain = build_spec(tokenizer, PromptConfig(template="Q: {problem}\n"), LatentConfig(), len(tokenizer))
    assert (
        tokenizer.decode(render_prompt(tokenizer, plain, alone.problem, alone.turns)) == "Q: Be brief.\n2+3?\n<think>"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK]}, "field 'messages': the last turn is of 'user'; expected the assistant's answer."),
        ({"messages": [REPLY]}, "field 'messages': no turn of the user before the answer"),
        ({"messages": []}, "field 'messages': got []; expected a list of messages."),
        ({"messages": [ASK, {"role": "tool", "content": "5"}]}, "message 2: role 'tool'; expected one of human, gpt"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "message 2: got None; expected a text"),
        ({"messages": [ASK, {**REPLY, "content": "5"}]}, "no thought; expected it between '<think>' and '</think>'"),
        ({"messages": [ASK, {**REPLY, "content": "<think>2 + 3"}]}, "'<think>' is never closed; expected '</think>'"),
        ({"messages": [ASK, {**REPLY, "content": "Ah. <think>2</think>5"}]}, "'Ah.' stands before '<think>'"),
        ({"messages": [ASK, {**REPLY, "content": "<think>2</think>"}]}, "nothing behind the thought"),
        ({"prompt": "2+3?", "answer": "5"}, "field 'completion': missing; expected a list of messages."),
        ({**OPENR1, "correctness_math_verify": [False] * 3}, "'generations': none is complete and verified"),
        ({**NUMINA, "solution": "Clear."}, "field 'solution': no \\boxed{} and no 'answer'"),
        (
            {"q": "2+3?", "a": "5"},
            "row: fields a, q; no format has these. Expected those of one of: records (problem+cot",
        ),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        read(row)
    assert message in str(error.value)


def test_evaluation_rows_need_a_question_and_an_answer() -> None:
    for row in (
        {"messages": [ASK], "answer": "5"},
        {"prompt": "2+3?", "answer": "5"},
        {"problem": "2+3?", "answer": 5},
    ):
        assert read(row, need_cot=False) == of("", "5", "5")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_formats_are_recognised_file_by_file(tmp_path: Path) -> None:
    sources = [
        {"path": write(tmp_path / "chat.jsonl", [{"messages": [ASK, REPLY]}, {"messages": [ASK]}])},
        {"path": write(tmp_path / "numina.jsonl", [NUMINA]), "weight": 2},
        {"path": write(tmp_path / "own.jsonl", [{"q": "1+1?", "cot": "2", "answer": "2"}]), "fields": {"problem": "q"}},
    ]
    other = write(tmp_path / "validation.jsonl", [{"question": "1+2?", "answer": "3 #### 3"}])
    splits = load_splits(DataConfig(train=sources, validation=other, test="", format="auto", on_error="skip"))
    assert [(r.id, r.source, r.problem) for r in splits.train] == [
        ("1/train-1", 0, "2+3?"),
        ("2/train-1", 1, "2+3?"),
        ("3/train-1", 2, "1+1?"),
    ]
    assert [(f["format"], f["rows"], f["bad"], f["weight"]) for f in splits.read["train"]] == [
        ("messages", 2, 1, 1.0),
        ("numina", 1, 0, 2.0),
        ("records", 1, 0, 1.0),
    ]
    assert (splits.validation[0].answer, splits.weights) == ("3", (1.0, 2.0, 1.0))


def test_a_source_of_no_known_format_is_refused_whatever_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "2+3?", "a": "5"}])
    splits = load_splits(DataConfig(train=path, validation=path, test="", format="auto", on_error="skip"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: row: fields a, q; no format has these"):
        _ = splits.train
