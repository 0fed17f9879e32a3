"""What a run will be trained on, shown beforehand: the parts of every stage's batch, lengths, and bad rows counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_sft import cli
from latent_sft.methods import SECTIONS, STAGES
from latent_sft.preview import as_text, preview

ROWS = [
    {"problem": "ann has 2 .", "cot": "2 + 3 = 5 ;\n5 * 2 = 10 ;", "answer": "10"},
    {"problem": "bob has 3 .", "cot": "3 + 3 = 6 ;", "answer": "6"},
    {"problem": "cay has 4 .", "cot": "4 = 4 ;"},
    {"problem": "dan has 5 .", "cot": "1 " * 30, "answer": "1"},
]
COT = "2|+|3|=|5|;|5|*|2|=|10|;".split("|")
PROMPT = "ann|has|2|.|<think>".split("|")


@pytest.fixture
def config(tmp_path: Path, tiny_config: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text('{"problem": "eve has 1 .", "answer": "1"}\n')
    off = [f"{section}.enabled=false" for section in SECTIONS.values()]
    files = [f"data.train={path}", f"data.validation={evaluated}", "data.test=", "data.max_cot_tokens=20"]
    return lambda *words: tiny_config(*off, *files, "latent.rate=5", *words)


def parts(found: dict[str, Any], stage: str, row: int = 0) -> dict[str, tuple[list[str], list[str], list[str]]]:
    shown = [r for r in found["rows"] if r["stage"] == stage][row]["parts"]
    return {part["part"]: (part["reads"], part["learns"], part.get("covers", [])) for part in shown}


def test_parts_by_hand(config: Any) -> None:
    named = ("no_cot", "cot", "stage1.union", "stage2", "codi.train")
    found = preview(config(*(f"{name}.enabled=true" for name in named)), rows=2)
    end, eos = "</think>", "<eos>"
    assert parts(found, "no-cot") == {
        "prompt": (PROMPT, [end], []),
        "</think>": ([end], ["10"], []),
        "answer": (["10", eos], [eos], []),
    }
    assert parts(found, "cot")["CoT"] == (COT, [*COT[1:], end], [])
    assert parts(found, "cot")["prompt"] == (PROMPT, ["2"], [])
    decoder = parts(found, "stage1-union")
    assert decoder["encoder: marker 2"][0] == ["m2"]
    assert decoder["latent 1"] == (["z1"], [";"], COT[:5])
    assert decoder["CoT after latent 1"] == ([";", "5", "*", "2"], ["5", "*", "2", "="], [])
    assert decoder["latent 3"] == (["z3"], [end], COT[10:])
    assert decoder["answer"] == (["10"], [eos], [])
    student = parts(found, "stage2")
    assert student["prompt"] == (PROMPT, ["latent 1"], [])
    assert student["latent 2"] == (["z2"], ["latent 3"], COT[5:10])
    assert student["latent 3"] == (["z3"], [end], COT[10:])
    fixed = parts(found, "codi")
    assert fixed["latents 1-3"] == (["z1", "z2", "z3"], [], COT)
    assert fixed["</think>"] == ([end], ["10"], [])
    # the teacher's CoT is without its last step
    assert fixed["teacher: CoT"] == (COT[:6], [*COT[1:6], end], [])


def test_what_is_counted(config: Any) -> None:
    found = preview(config("cot.enabled=true", "latent.max_latents=2"), rows=1)
    (train,) = found["read"]["train"]
    skipped = {"field 'answer': missing": 1, "cot: N tokens": 1}
    assert (train["rows"], train["used"], train["skipped"]) == (4, 2, skipped)
    assert found["lengths"]["CoT"] == {"mean": 9.0, "p95": pytest.approx(11.7), "max": 12}
    assert found["beyond"] == {"latent.max_latents=2": 1, "eval.max_cot_tokens=40": 0, "latent.max_answer_tokens=4": 0}
    text = as_text(found)
    assert "data.on_error=raise: a run would end at the first of these 2 rows" in text
    assert "1 rows are longer than latent.max_latents=2" in text
    assert "\x1b" not in text


def test_every_stage_can_be_shown(config: Any) -> None:
    shown = preview(config(*(f"{section}.enabled=true" for section in SECTIONS.values())), rows=2)["rows"]
    assert {row["stage"] for row in shown} == set(STAGES)
    for row, written in zip(shown, ROWS[:2] * len(STAGES), strict=True):
        if "error" in row:
            assert "mixtures" in row["error"]  # these rows have none, and only one method needs them
            continue
        learnt = [text for part in row["parts"] for text in part["learns"]]
        assert learnt[-1] == "<eos>"
        assert written["answer"] in learnt


def test_the_command_writes_nothing_and_needs_no_weights(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latent_sft.config.load import to_yaml

    before = sorted(tmp_path.iterdir())
    experiment = tmp_path.parent / f"{tmp_path.name}.yaml"
    experiment.write_text(to_yaml(config("cot.enabled=true")))
    assert cli.main(["data", str(experiment), "--rows", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in found["rows"]] == ["cot"]
    assert cli.main(["data", str(experiment), "--rows", "1"]) == 0
    assert "2|+|3|=|5|;|5|*|2|=|10|;" in capsys.readouterr().out
    assert sorted(p for p in tmp_path.iterdir() if p.name != "run") == before
    assert not (tmp_path / "run").exists()
