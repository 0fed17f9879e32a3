"""Rows that a model writes: what is kept, what decides a sample, and that a kill neither loses nor doubles a row."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from latent_sft import cli
from latent_sft.config.load import load_config, to_yaml
from latent_sft.config.schema import DataConfig
from latent_sft.data.prompts import render_prompt
from latent_sft.data.records import load_splits
from latent_sft.evaluation.answers import is_correct
from latent_sft.experiment.workspace import Workspace
from latent_sft.inference.engine import Decoded, Engine
from latent_sft.inference.noise import Sampling
from latent_sft.inference.show import load
from latent_sft.models.load import build_tiny, save_lm, save_thinker
from latent_sft.train.run import train_stage

COUNT = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CoT model that has learnt to write the form of an answer, and is right now and then."""
    folder = tmp_path_factory.mktemp("sample") / "run"
    ended = ["stage1.union.enabled=false", "no_cot.enabled=false", "stage2.enabled=false", "cot.enabled=true"]
    learnt = ["cot.max_steps=150", "cot.eval_every=150", "cot.learning_rate=1e-2"]
    learnt += [f"data.synthetic.{key}" for key in ("modulus=3", "min_steps=1", "max_steps=1")]
    sampled = ["eval.temperature=1", "eval.top_p=1", "eval.max_cot_tokens=12", "latent.max_answer_tokens=2"]
    config = load_config(None, [*TINY, *ended, *learnt, *sampled, f"run_dir={folder}"])
    (folder.parent / "run.yaml").write_text(to_yaml(config))
    train_stage(config, "cot")
    return folder


def sample(run: Path, out: Path, *words: str) -> int:
    return cli.main(["sample", f"{run.parent / 'run.yaml'}", "--n", str(COUNT), "--out", str(out), *words])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def everything(run: Path) -> Path:
    out = run.parent / "all.jsonl"
    assert sample(run, out, "--split", "test", "--keep", "all") == 0
    return out


def test_rows_are_what_the_engine_writes_for_a_problem_alone(run: Path, everything: Path) -> None:
    reasoner, splits = load(run / "cot/final"), Workspace(load_config(run / "config.yaml")).splits
    expected = []

    def alone(prompt: list[int], number: int) -> Decoded:
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=0)
        model, spec = reasoner.thinker.lm, reasoner.spec
        with Engine(
            model, spec, thinker="explicit", longest=len(prompt), batch_size=1, sampling=sampling, max_cot_tokens=12
        ) as engine:
            engine.add(prompt, number=number)
            while engine.busy():
                found = engine.step(more=False)
        return found[number]

    for record in splits.test:
        prompt, seen = render_prompt(reasoner.tokenizer, reasoner.spec, record.problem), set[str]()
        for n in range(COUNT):
            decoded = alone(prompt, random.Random(f"{record.id}/{n}").getrandbits(48))
            answer, thought = (reasoner.tokenizer.decode(ids) for ids in (decoded.answer_ids, decoded.thought_ids))
            right = decoded.finished and is_correct(answer, record.answer) and len(decoded.thought_ids) < 12
            if right and thought and thought not in seen:
                expected.append((f"{record.id}/{n}", record.problem, thought, answer, record.answer))
                seen.add(thought)
    rows = lines(everything)
    assert [(r["id"], r["problem"], r["cot"], r["cot_answer"], r["answer"]) for r in rows] == expected
    assert len(expected) > 5  # the model is right now and then, else this shows nothing


def test_what_is_kept_and_what_a_row_says_of_itself(run: Path, everything: Path, tmp_path: Path) -> None:
    every = lines(everything)
    for keep in ("shortest", "first"):
        out = tmp_path / f"{keep}.jsonl"
        assert sample(run, out, "--split", "test", "--keep", keep, "eval.batch_size=3") == 0
        kept = {}
        for row in every:
            name = row["id"].rpartition("/")[0]
            better = name not in kept or (
                keep == "shortest" and row["sampled"]["tokens"] < kept[name]["sampled"]["tokens"]
            )
            kept = {**kept, name: row} if better else kept
        assert lines(out) == [{**row, "id": name} for name, row in kept.items()]
    longest = max(row["sampled"]["tokens"] for row in every)
    limited = tmp_path / "limited.jsonl"
    assert sample(run, limited, "--split", "test", "--keep", "all", "--max-tokens", str(longest - 1)) == 0
    assert lines(limited) == [row for row in every if row["sampled"]["tokens"] < longest]
    about = every[0]["sampled"]
    assert {key: about[key] for key in ("model", "of", "temperature", "top_p", "seed", "grader")} == {
        "model": f"{run}: cot",
        "of": COUNT,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "grader": "auto",
    }
    journal = {entry["id"]: entry for entry in lines(everything.with_suffix(".sampled") / "problems.jsonl")}
    assert len(journal) == 12  # also what was never solved
    assert all(row["sampled"]["correct"] == journal[row["id"].rpartition("/")[0]]["correct"] for row in every)


def test_the_rows_are_training_rows(everything: Path) -> None:
    shown = lines(everything)
    splits = load_splits(DataConfig(train=str(everything), format="auto", validation="synthetic"))
    assert [(r.id, r.cot, r.cot_answer) for r in splits.train] == [(r["id"], r["cot"], r["cot_answer"]) for r in shown]


def test_a_checkpoint_answers_a_file_of_chats(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = tmp_path / "chats.jsonl"
    asked = [{"role": "system", "content": "bob"}, {"role": "user", "content": "bob has 2 . how many ?"}]
    problems.write_text("".join(json.dumps({"messages": asked, "answer": str(i)}) + "\n" for i in range(3)))
    out, words = tmp_path / "out.jsonl", ["--n", "20", "eval.temperature=1", "eval.max_cot_tokens=12"]
    assert cli.main(["sample", f"{run}/cot/final", "--data", str(problems), "--out", str(out), *words]) == 0
    rows = lines(out)
    assert rows
    assert rows[0]["messages"][:2] == asked
    assert set(rows[0]["messages"][2]) == {"role", "content", "reasoning_content"}
    assert [r.cot for r in load_splits(DataConfig(train=str(out), format="auto", validation="synthetic")).train] == [
        row["messages"][2]["reasoning_content"] for row in rows
    ]
    assert f"{len(rows)} rows kept" in capsys.readouterr().out


def test_a_kill_loses_and_doubles_no_row(run: Path, everything: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.jsonl"
    journal = out.with_suffix(".sampled") / "problems.jsonl"
    words = ["sample", f"{run.parent / 'run.yaml'}", "--n", str(COUNT), "--out", str(out), "--split", "test"]
    slow = [*words, "--keep", "all", "eval.batch_size=1"]
    process = subprocess.Popen([sys.executable, "-m", "latent_sft.cli", *slow], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    known = len(journal.read_bytes().splitlines())
    assert sample(run, out, "--split", "test", "--keep", "all", "--limit", "2") == 0
    assert {row["id"].rpartition("/")[0] for row in lines(out)} <= {"modular-test-0", "modular-test-1"}
    out.unlink()
    assert 1 <= known < 12
    with open(journal, "a") as handle:
        handle.write('{"id": "modular-test-11", "corr')  # a line that a kill cut off
    assert sample(run, out, "--split", "test", "--keep", "all") == 0
    assert out.read_bytes() == everything.read_bytes()
    ids = [entry["id"] for entry in lines(journal)]
    assert sorted(ids) == sorted(f"modular-test-{i}" for i in range(12))


def test_it_is_finished_once_and_nothing_is_overwritten(
    run: Path, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything.stat().st_mtime_ns
    assert sample(run, everything, "--split", "test", "--keep", "all") == 0
    assert everything.stat().st_mtime_ns == before
    assert sample(run, everything, "--split", "test", "--keep", "all", "eval.seed=1") == 2
    assert "made by another experiment (seed was 0, now 1)" in capsys.readouterr().err
    other = tmp_path / "mine.jsonl"
    other.write_text("mine")
    assert sample(run, other) == 2
    assert "mine.jsonl: exists, and was not made by this command" in capsys.readouterr().err
    assert other.read_text() == "mine"


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = tmp_path / "silent"
    work = Workspace(load_config(run / "config.yaml"))
    save_lm(build_tiny(work.config.model.tiny, work.tokenizer, 1), silent, work.tokenizer)
    save_thinker(silent, work.spec, "latent")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "bob has 2 .", "answer": "2"}\n')
    out = tmp_path / "out.jsonl"
    for words, message in [
        ([str(silent), "--data", str(rows)], "writes no reasoning; expected a model that does, such as cot."),
        ([str(silent)], "--data: expected a file of problems, because"),
        ([str(run.parent / "run.yaml"), "--model", "kava"], "--model: the experiment trains no 'kava'."),
        ([f"{run}/cot/final", "--data", str(rows), "eval.temperature=0"], "eval.temperature: got 0.0, expected > 0"),
        ([str(run.parent / "run.yaml"), "--n", "0"], "--n: got 0, expected 1 or more."),
        ([str(run.parent / "run.yaml"), "--data", "x", "--split", "test"], "--split: is of the experiment's own data"),
    ]:
        assert cli.main(["sample", *words, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["sample", f"{run}/cot/final", "--data", str(rows), "--out", f"{tmp_path}/out.txt"]) == 2
    assert "--out: got" in capsys.readouterr().err
