"""A checkpoint scored without its experiment: on a file, on benchmarks, and as the experiment scores it."""

from __future__ import annotations

import http.server
import json
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from latent_sft import cli
from latent_sft.config.benchmarks import benchmarks
from latent_sft.errors import ConfigError
from latent_sft.evaluation.checkpoint import evaluate_checkpoint
from latent_sft.evaluation.report import write_report
from latent_sft.evaluation.run import decided_by, evaluate
from latent_sft.experiment.graph import graph_of
from latent_sft.experiment.workspace import Workspace
from latent_sft.models.load import build_tiny, save_lm, save_thinker

# a row of each benchmark as it is published, with the answer that it must be read to have
PUBLISHED = {
    "gsm8k": ({"question": "Ann has 3 . Bob 4 ?", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,007"}, "1007"),
    "gsm-hard": ({"input": "Ann has 30 ?", "code": "def solution(): ...", "target": -12.5}, "-12.5"),
    "svamp": (
        {"ID": "chal-1", "Body": "Ann has 3.", "Question": "How many?", "Answer": "3.0", "question_concat": "Ann ?"},
        "3.0",
    ),
    "multiarith": ({"question": " 5 + 5 ?", "final_ans": "10"}, "10"),
    "math500": ({"unique_id": "a/1.json", "problem": "Find $x$.", "solution": "$x = \\boxed{p}$", "answer": "p"}, "p"),
    "aime24": ({"id": 60, "problem": "Find $N$.", "solution": "long", "answer": "025", "year": "2024"}, "025"),
    "aime25": ({"id": "0", "problem": "Find $N$.", "answer": "70"}, "70"),
    "prosqa": ({"question": "Is Tom a ?", "steps": ["Tom is b."], "answer": "Tom is b."}, "Tom is b."),
}
LINE = "5 6 * 1 2||5 6 + 0 1 #### 5 7 2"


@pytest.fixture
def run(tmp_path, tiny_config):
    """Return the opened tiny experiment with an untrained `stage2`, settings added by calling it."""

    def opened(*overrides: str) -> Workspace:
        fixed = ("eval.splits=[test]", "eval.interventions=[]", "eval.latency_problems=0", "eval.grader=text")
        work = Workspace(tiny_config(*fixed, *overrides))
        step = work.step("stage2")
        if step.manifest() is None:
            save_lm(build_tiny(work.config.model.tiny, work.tokenizer, 1), step.final, work.tokenizer)
            save_thinker(step.final, work.spec, "latent")
            step.begin(0)
            step.finish(train_seconds=1.0, examples_seen=2)
        return work

    return opened


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def published(folder: Path, name: str) -> str:
    if name == "multiplication-4x4":
        (folder / "mult.txt").write_text(f"{LINE}\n")
        return f"{name}={folder / 'mult.txt'}"
    return f"{name}={written(folder / f'{name}.jsonl', [PUBLISHED[name][0]])}"


def test_a_checkpoint_scores_on_a_file_what_its_experiment_scores(run, tmp_path, capsys):
    work = run()
    evaluate(work.config, ["latent-sft"], work=work)
    own = json.loads((work.directory / "eval/latent-sft/test.json").read_text())
    # two thirds of the rows have the model's own answer for a reference
    rows = [
        {"question": row.problem, "why": row.cot, "answer": solved["prediction"] if number % 3 else "another"}
        for number, (row, solved) in enumerate(zip(work.splits.test, own["problems"], strict=True))
    ]
    file, out, settings = (
        tmp_path / "mine.jsonl",
        tmp_path / "out",
        ["data.fields.problem=question", "eval.grader=text"],
    )
    checkpoint = str(work.step("stage2").final)
    command = ["eval", checkpoint, "--data", written(file, rows), "--out", str(out), "data.fields.cot=why", *settings]
    assert cli.main(command) == 0
    result, manifest = (json.loads((out / "eval/final" / n).read_text()) for n in ("mine.json", "mine/manifest.json"))
    assert [p["prediction"] for p in result["problems"]] == [p["prediction"] for p in own["problems"]]
    assert [p.get("latents") for p in result["problems"]] == [p.get("latents") for p in own["problems"]]
    assert result["summary"]["accuracy"] == 8 / 12
    for key in ("latent_steps_mean", "forward_passes_mean", "answer_tokens_mean", "ecr"):
        assert result["summary"][key] == own["summary"][key]
    shown = capsys.readouterr().out
    assert "66.7 ± 14.2" in shown and str(out / "eval/final") in shown
    # the same again is there already; under other settings it is done anew, and the earlier result is kept
    assert cli.main(command) == 0
    assert json.loads((out / "eval/final/mine/manifest.json").read_text()) == manifest
    assert cli.main([*command, "eval.limit=3"]) == 0
    kept = out / "eval/final/mine" / manifest["fingerprint"] / "mine.json"
    assert json.loads(kept.read_text()) == result
    assert json.loads((out / "eval/final/mine.json").read_text())["summary"]["num_examples"] == 3


def test_thinking_can_be_left_out_or_cut(run, tmp_path):
    work = run()
    final, rows = str(work.step("stage2").final), [{"problem": "bob has 3 . wins 2 . how many ?", "answer": "5"}]
    data = f"data.test={written(tmp_path / 'one.jsonl', rows)}"
    without, cut = (
        evaluate_checkpoint(final, [data, *more], thinker=thinker, out=tmp_path / "out")
        for thinker, more in (("none", ()), (None, ("latent.max_latents=2", "latent.min_latents=2")))
    )
    assert [r["model"] for r in without.rows + cut.rows] == ["final-none", "final"]
    assert [r["reasoning_steps_mean"] for r in without.rows + cut.rows] == [0, 2]
    with pytest.raises(ConfigError, match=r"cannot think as 'explicit'; expected latent or none\."):
        evaluate_checkpoint(final, [data], thinker="explicit", out=tmp_path / "out")


def test_what_cannot_be_scored_is_refused(run, tmp_path, capsys):
    final, out = run().step("stage2").final, tmp_path / "out"
    for words, message in (
        ((), r"got nothing to score; expected --data FILE, or --set NAME of gsm8k, "),
        (("latent.rate=3",), r"latent.rate: means nothing for a checkpoint"),
        (("--set", "gsm8"), r"eval.sets: unknown set 'gsm8'. Did you mean 'gsm8k'\?"),
        (("--set", "svamp", "--set", "svamp=x.jsonl"), r"eval.sets: got \['svamp', 'svamp=x.jsonl'\], expected differ"),
        (("--model", "cot"), r"--model: only means something with an experiment"),
        (("--data", "no/such.jsonl"), r"no/such.jsonl: no such file or folder"),
    ):
        assert cli.main(["eval", str(final), "--out", str(out), *words]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not list(out.rglob("*.json"))


@pytest.mark.parametrize("option", ["--data", "--out", "--thinker"])
def test_options_of_checkpoints_are_refused_for_experiments(option, capsys):
    assert cli.main(["eval", "quickstart", option, "x"]) == 2
    assert f"{option}: only means something with a checkpoint" in capsys.readouterr().err


def test_every_benchmark_is_read_as_published_and_shown_in_one_table(run, tmp_path, capsys, caplog):
    final, out = run().step("stage2").final, tmp_path / "out"
    words = [word for name in benchmarks() for word in ("--set", published(tmp_path, name))]
    assert set(benchmarks()) == {*PUBLISHED, "multiplication-4x4"}
    assert cli.main(["eval", str(final), "--out", str(out), "eval.batch_size=8", *words]) == 0
    shown = capsys.readouterr().out
    for name, known in benchmarks().items():
        found = json.loads((out / "eval/final" / f"{name}.json").read_text())
        expected = "5 7 2" if name == "multiplication-4x4" else PUBLISHED[name][1]
        assert {p["reference"] for p in found["problems"]} == {expected}
        assert found["summary"]["grader"] == known.grader
        assert found["summary"]["samples_per_problem"] == len(found["problems"]) == known.samples
        assert f" {name} " in shown
        assert f"has 1 rows, but the published set {known.rows}" in caplog.text
    assert {name for name, known in benchmarks().items() if known.samples > 1} == {"math500", "aime24", "aime25"}


def test_a_number_of_samples_that_is_given_wins(run, tmp_path):
    final = str(run().step("stage2").final)
    settings = [f"eval.sets=[{published(tmp_path, 'aime25')}]", "eval.sample=true", "eval.num_samples=3"]
    (row,) = evaluate_checkpoint(final, settings, out=tmp_path / "out").rows
    assert row["samples_per_problem"] == 3
    assert row["pass_at"].keys() == {"1"}


def test_sets_of_an_experiment_leave_its_splits_alone(run, tmp_path):
    work = run()
    before = decided_by(work, "latent-sft")
    assert "sets" not in before["eval"]
    evaluate(work.config, ["latent-sft"], work=work)
    manifest = work.directory / "eval/latent-sft/test/manifest.json"
    done = manifest.read_text()
    work = run(f"eval.sets=[{published(tmp_path, 'svamp')}]")
    assert decided_by(work, "latent-sft") == before
    assert graph_of(work)["eval latent-sft"].status(work.directory) == "begun, not finished"
    found = evaluate(work.config, ["latent-sft"], work=work)["latent-sft"]
    assert manifest.read_text() == done
    assert graph_of(work)["eval latent-sft"].status(work.directory) == "finished"
    assert (found["test"]["grader"], found["svamp"]["grader"]) == ("text", "numeric")
    page = write_report(work.directory, title="tiny").with_suffix(".md").read_text()
    first = page.split("\n## ")[1]
    assert "| latent-sft | test |" in first and "| latent-sft | svamp |" in first


def test_unknown_sets_of_an_experiment_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"eval.sets: unknown set 'math_500'. Did you mean 'math500'\?"):
        tiny_config("eval.sets=[gsm8k,math_500]")


def test_a_file_behind_a_url_is_fetched_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    published(tmp_path / "site", "multiplication-4x4")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        final, settings = str(run().step("stage2").final), [f"eval.sets=[multiplication-4x4={url}/mult.txt]"]
        first = evaluate_checkpoint(final, settings, out=tmp_path / "out").rows
        server.shutdown()
        thread.join()
    assert evaluate_checkpoint(final, settings, out=tmp_path / "out").rows == first
    with pytest.raises(Exception, match=r"other.txt: could not be fetched .* download it elsewhere and give the path"):
        evaluate_checkpoint(final, [f"eval.sets=[multiplication-4x4={url}/other.txt]"], out=tmp_path / "out")
