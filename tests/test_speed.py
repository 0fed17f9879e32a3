"""The speed benchmark: its plain path is right, its floor is counted right, and a tiny run gives every table."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # `eval` is not installed

from eval.speed import cases, floor, measure, plain, tables
from eval.speed.__main__ import BEGIN, END, main
from eval.speed.cases import LARGER, LONGEST, QUICKSTART, TINY, Case, Size, Way, spec_of

SPEC = spec_of(TINY, think_ids=(1,), end_think_ids=(4,))
ROW = {"prompt": [9, 1], "cot": [11, 12, 13], "segment_lengths": [2, 1], "answer": [21, 7]}
QUICK = cases.all_cases(True)


def _seen(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if value == 0 else "." for value in row) for row in mask[0].tolist()]


def test_plain_layout_and_masks_by_hand():
    """Prompt `p T`, CoT `a b | c`: encoder `p T a b m c m /`, decoder `p T Z c Z / A E`."""
    batch = plain.stage1_inputs([ROW], SPEC)
    assert batch["encoder_ids"].tolist() == [[9, 1, 11, 12, 0, 13, 0, 4]]
    assert batch["markers"] == [[4, 6]]
    assert _seen(batch["encoder_mask"][0]) == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xxxx.x..",
        "xxxx.xx.",
        "xxxx.x.x",
    ]
    assert batch["ids"].tolist() == [[9, 1, 0, 13, 0, 4, 21, 7]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 13, -100, 4, 21, 7]]
    assert batch["position"].tolist() == [[0, 1, 2, 3, 3, 4, 5, 6]]
    assert batch["latents"] == [[2, 4]]
    assert _seen(batch["mask"][0]) == [
        "x.......",
        "xx......",
        "xxx.....",
        "..xx....",
        "xxx.x...",
        "xxx.xx..",
        "xxx.xxx.",
        "xxx.xxxx",
    ]


@pytest.mark.parametrize("case", measure.checked(QUICK), ids=lambda case: f"{case.part}, {case.name}")
def test_both_paths_give_the_same(case):
    difference = measure.differences(case, "cpu")
    assert len(difference) > 1
    assert measure.is_same(difference), difference


@pytest.mark.parametrize("part", ["stage1", "labels"])
def test_a_wrong_path_is_noticed(part, monkeypatch):
    """A marker that may be read by later tokens is a small mistake, and is seen."""
    right = plain.encoder_inputs

    def wrong(rows, spec):
        batch = right(rows, spec)
        first = batch["markers"][0][0]
        batch["encoder_mask"][0, 0, first + 1 :, first] = 0.0
        return batch

    monkeypatch.setattr(plain, "encoder_inputs", wrong)
    case = next(case for case in QUICK if case.part == part)
    assert not measure.is_same(measure.differences(case, "cpu"))


def test_a_teacher_that_is_read_once_and_forgotten_is_noticed(monkeypatch):
    """KaVa's step gives what reading the teacher twice gives, but not where its cross-entropy is left out."""
    case = next(case for case in QUICK if case.part == "kava")
    right = cases.distill_settings
    monkeypatch.setattr(cases, "distill_settings", lambda path: right("published"))
    assert not measure.is_same(measure.differences(case, "cpu"))


def test_floor_by_hand():
    """One layer, H=2, I=3, V=5: W = 4*4 + 3*6 = 34. Prompt 3, CoT 5 at r=2 (2+2+1), `</think>` 3, answer 2."""
    size = Size(hidden=2, layers=1, heads=1, intermediate=3, vocab=50)
    case = Case(part="stage1", name="", size=size, prompt=3, cot=(5,), rate=2, answer=2)
    text = 3 + 5
    encoder_pairs = text * (text + 1) // 2 + (3 + 2 + 1) + (3 + 4 + 1) + (3 + 5 + 1)
    main = 3 + 3 + 3 + 2 - 1
    decoder_pairs = main * (main + 1) // 2 + 2  # one token of the chunk of 2, none of that of 1
    blocks = 2 * 34 * (text + 3 + main + 1) + 4 * 2 * (encoder_pairs + decoder_pairs)
    head = 2 * 2 * 50 * (3 + 5)  # S_2, S_3, `</think>` and the answer
    assert floor.of_case(case) == 3 * (blocks + head) + 2 * 2 * 50 * 3
    decoder = dataclasses.replace(case, part="decoder")
    assert floor.of_case(decoder) == 3 * (2 * 34 * (main + 1) + 4 * 2 * decoder_pairs + head)
    read = 2 * 34 * (text + 3) + 4 * 2 * encoder_pairs
    assert floor.of_case(dataclasses.replace(case, part="labels")) == read + 2 * 2 * 50 * 3
    # stage 2: prompt 3, two latents, tail 5; KL at 2 positions and CE at 5
    second = dataclasses.replace(case, part="stage2", cot=(2,), rate=1)
    assert floor.of_case(second) == 3 * (2 * 34 * 10 + 4 * 2 * 55 + 2 * 2 * 50 * 7)


def test_full_cases_cover_what_the_aims_need():
    every = cases.all_cases(False)
    names = {(case.part, case.name): case for case in every}
    assert len(names) == len(every)
    for name in (tables.STAGE1_SHORT, tables.STAGE1_LONG):
        assert {"plain", "fast"} <= set(names["stage1", name].paths)
    assert names["stage1", tables.STAGE1_LONG].memory == ("plain", "fast")
    long = names["stage1", f"CoT {LONGEST}, r=16"]
    assert long.limit_gib == 8 and not long.timed and "fast" in long.memory
    assert {case.cot[0] for (part, _), case in names.items() if part == "decoder"} == {1024, 2048, 4096, 8192}
    others = [case.size for case in every if case.size not in (QUICKSTART, LARGER)]
    assert all(size.hidden == 256 and size.vocab == 32_000 for size in others)


def timed(part: str, name: str, cot: list[int], items: int = 1, **seconds: list[float]) -> dict:
    """Return what a timed case leaves, made up."""
    paths = list(seconds)
    case = {"part": part, "name": name, "cot": cot, "rate": 4, "paths": paths, "items": [items] * len(paths)}
    return {**case, "seconds": seconds, "prepare_seconds": {path: [0.1] for path in paths}, "flops": {}}


def test_exponent_is_the_slope_of_the_logarithms():
    found = [timed("decoder", "", [length], fast=[length**1.5, 1e-9, 1e9]) for length in (1024, 2048, 8192)]
    results = {"cases": found, "matmul_rate": 1.0}
    assert tables.exponent(results) == pytest.approx(1.5)
    assert tables.exponent({**results, "cases": found[:1]}) is None


def test_aims_on_made_up_results():
    peak = {"peak": 2**30, "process_peak": 3 * 2**30, "exceeded": False}
    results = {
        "matmul_rate": 1.0,
        "differences": [{"case": "a", "loss": 1e-6}, {"case": "b", "gradient": 1e-3}],
        "cases": [
            timed("stage1", tables.STAGE1_SHORT, [512], plain=[3.0, 2.0, 9.0], fast=[1.0, 2.0, 0.5]),
            timed("step", "batch 64, 9 steps", [9], 64, explicit=[1.0], latent=[1.2]),
        ],
        "memory": [
            {"part": "stage1", "name": tables.STAGE1_LONG, "paths": {"plain": {**peak, "peak": 2**32}, "fast": peak}},
            {
                "part": "stage1",
                "name": f"CoT {LONGEST}, r=16",
                "paths": {"fast": peak, "plain": {"peak": None, "process_peak": None, "exceeded": True}},
            },
        ],
    }
    rows = {row[0]: tuple(row[1:]) for row in tables.aims(results).to_numpy().tolist()}
    assert len(rows) == 15
    assert rows["the paths agree, to 0.0001"] == ("all but b", "no")
    assert rows["stage 1, CoT 512, r=4: at least 2×"] == ("3.00×", "yes")
    assert rows["stage 1, CoT 4096, r=16: at least 4×"] == ("not measured", "")
    assert rows["memory, CoT 4096, r=16: at most 1/3 of plain"] == ("0.25", "yes")
    assert rows["CoT of 16384 tokens: whole process at most 8 GiB"] == ("3.00 GiB", "yes")
    assert rows["CoT of 16384 tokens: plain cannot in 8 GiB"] == ("over 8.00 GiB", "yes")
    assert rows["a latent step, batch 64: at most 1.15 explicit steps"] == ("1.20", "no")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc, Linux only")
def test_peak_memory_is_what_a_step_allocates(monkeypatch):
    def allocate(case, _device):
        count = case.cot[0] * 2**18  # one MiB per token
        return {"fast": Way(nn.Linear(1, 1), list, lambda _: torch.ones(count).sum())}

    monkeypatch.setitem(cases.PARTS, "stage1", allocate)
    found = measure.peak(Case(part="stage1", name="", size=TINY, cot=(200,)), "fast", "cpu")
    assert 195 * 2**20 < found["peak"] < 215 * 2**20
    assert found["process_peak"] > found["peak"] and not found["exceeded"]
    assert found["weights"] == 2 * 4  # weight and bias


def test_one_backbone_holds_its_weights_once():
    case = next(case for case in QUICK if case.part == "shared")
    held = {}
    for path, way in cases.build(case, "cpu").items():
        way.step(way.prepare())
        held[path] = sum({p.data_ptr(): p.numel() for p in way.module.parameters()}.values())
    assert held["plain"] / 2 < held["fast"] < 0.8 * held["plain"]


def test_a_process_beyond_its_limit_is_stopped():
    case = next(case for case in QUICK if case.part == "stage2")
    found = measure.memory_in_fresh_process(dataclasses.replace(case, limit_gib=0.02), "fast", "cpu", 1, True)
    assert found == {"peak": None, "process_peak": None, "exceeded": True}


def test_a_tiny_run_writes_tables_json_plots_and_docs(tmp_path, capsys):
    docs, out = tmp_path / "docs" / "speed.md", tmp_path / "out"
    docs.parent.mkdir()
    docs.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    only = "stage1,stage2,labels,decode,kava"
    run = ["--quick", "--threads", "1", "--repeats", "2", "--no-memory", "--only", only, "--out", str(out)]
    assert main([*run, "--write-docs", str(docs)]) == 0
    results = json.loads((out / "speed.json").read_text())
    assert [(c["part"], c["name"]) for c in results["cases"]] == [(c.part, c.name) for c in QUICK if c.timed]
    assert all(len(times) == 2 and min(times) > 0 for c in results["cases"] for times in c["seconds"].values())
    for case in results["cases"]:
        if case["part"] == "step":  # the same number of steps is what is compared
            assert case["steps"]["latent"] == case["steps"]["explicit"]
        if case["part"] == "quickstart":
            assert set(case["steps"]["explicit"]) == {21} and set(case["steps"]["latent"]) == {10}
        if case["part"] == "decode":
            assert len(set(case["steps"]["plain"])) > 1, "random models are to stop after varied lengths"
            assert len({sum(steps) / len(steps) for steps in case["steps"].values()}) == 1, "equally long problems"
    assert (out / "speed_stage1.png").exists() and (docs.parent / "images" / "speed_decoding.png").exists()
    text = docs.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    found = [line.strip("*") for line in text.splitlines() if line.startswith("**")]
    starts = (
        "Aims",
        "The paths",
        "Stage 1, fo",
        "Stage 1, the",
        "Stage 2",
        "Decoding",
        "Latent",
        "A training step of K",
    )
    assert len(found) == len(starts) and all(map(str.startswith, found, starts)), found
    assert "| CoT 16, r=2 | fast |" in capsys.readouterr().out
    # the same results again, without measuring
    before = docs.read_bytes()
    assert main(["--results", str(out / "speed.json"), "--out", str(out), "--write-docs", str(docs)]) == 0
    assert docs.read_bytes() == before


def test_wrong_options_are_refused_before_anything_runs(capsys, tmp_path):
    for arguments, message in (
        (["--only", "stage3"], "expected some of stage1,stage2,labels,decode,kava,shared"),
        (["--write-docs", str(tmp_path / "page.md")], "the tables belong between the lines"),
    ):
        (tmp_path / "page.md").write_text(f"only one mark: {BEGIN}")
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
