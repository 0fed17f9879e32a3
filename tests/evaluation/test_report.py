import dataclasses
import json
import math
import re
from html import escape
from html.parser import HTMLParser

import pytest

from latent_sft.errors import ArtefactError
from latent_sft.evaluation import plots
from latent_sft.evaluation.report import write_report
from latent_sft.evaluation.results import read_curves, read_run
from latent_sft.evaluation.tables import accuracy, duration, percent, result_table
from latent_sft.inference.show import ShownLatent, Solution

STEPS = {"no-cot": 0.0, "cot": 24.0, "stage1": 12.0, "latent-sft": 12.1}
ACCURACY = {"no-cot": 0.31, "cot": 0.998, "stage1": 0.996, "latent-sft": 0.982}
STAGES = ("no-cot", "cot", "stage1-union", "stage2")
LATENTS = [[["=", 0.71], ["5", 0.2], ["<b>", 0.09]], [[" ", 0.5], ["\n", 0.3], ["|", 0.2]]]


def write_evaluation(run, model, split, content, source=""):
    """Write an evaluation, and the manifest that names the stage whose weights were used."""
    folder = run / "eval" / model / split
    folder.mkdir(parents=True)
    (run / "eval" / model / f"{split}.json").write_text(json.dumps(content))
    manifest = {"status": "finished", "fingerprint": f"{model} {split}", "inputs": {"model": source, "seed": 0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_stage(run, stage, source="base", **results):
    """Write the manifest of a stage that started from another one; its fingerprint is its name."""
    (run / stage).mkdir()
    manifest = {"status": "finished", "fingerprint": stage, "inputs": {"step": "x", "source": source}, **results}
    (run / stage / "manifest.json").write_text(json.dumps(manifest))


def result(model, split):
    summary = {
        "accuracy": ACCURACY[model] - 0.01 * (split == "validation"),
        "accuracy_se": 0.004,
        "num_examples": 1000,
        "reasoning_steps_mean": STEPS[model],
        "answer_tokens_mean": 1.0,
        "forward_passes_mean": STEPS[model] + 3,
        "finished_share": 1.0,
        "seconds_per_problem": 0.0123,
        "pass_at": {"1": ACCURACY[model]},
        "accuracy_by_steps": {
            str(n): {"accuracy": ACCURACY[model] - 0.02 * n, "accuracy_se": 0.01, "num_examples": 300}
            for n in (3, 4, 5)
        },
    }
    problem = {"id": "t-0", "sample": 0, "prediction": "10", "extracted": "10", "reference": "10", "correct": True}
    if model != "no-cot" and split == "test":
        given = {"accuracy": ACCURACY[model], "accuracy_se": 0.004, "difference": 0.0, "difference_ci": [0.0, 0.0]}
        zero = {
            "accuracy": 0.1,
            "accuracy_se": 0.01,
            "difference": 0.1 - ACCURACY[model],
            "difference_ci": [-0.95, -0.85],
        }
        summary |= {"interventions": {"given": given, "zero": zero}, "gold_recall": 0.75, "gold_recall_chance": 0.5}
    if model in ("stage1", "latent-sft"):
        summary |= {
            "latent_steps_mean": STEPS[model],
            "latent_steps_max": 15,
            "latent_entropy_mean": 1.23,
            "end_top1_share": 0.001,
            "ecr": {"1": 0.4, "5": 0.9, "10": 1.2},
        }
        problem |= {
            "problem": "bob has 1 . <script>alert(1)</script> triples 5 . how many ?",
            "latents": LATENTS,
            "cot_chunks": ["1 *", "5 =", "5 ;"],
        }
    return {"model": model, "split": split, "summary": summary, "problems": [problem]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with four models, two splits and four stages, and its report (written once: figures take seconds)."""
    run = tmp_path_factory.mktemp("run")
    for model, stage in zip(STEPS, STAGES, strict=True):
        for split in ("test", "validation"):
            write_evaluation(run, model, split, result(model, split), source=stage)
    sources = {"stage1-union": "cot", "stage2": "stage1-union"}
    for seconds, stage in zip((60.0, 90.5, 200.0, 300.0), STAGES, strict=True):
        write_stage(run, stage, sources.get(stage, "base"), train_seconds=seconds, examples_seen=48_000)
    lines = []
    for step in range(20, 1500, 20):
        lines.append({"step": step, "train/loss": 3 * math.exp(-step / 400), "train/loss_ce": math.exp(-step / 300)})
        if step % 200 == 0:
            lines.append({"step": step, "eval/accuracy": 1 - math.exp(-step / 400), "eval/latent_entropy": 1.5})
    for stage in ("cot", "stage2"):
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("name: fake <run>\n")
    assert write_report(run, title="A <fake> run") == run / "report" / "report.html"
    return run


@pytest.fixture(scope="module")
def html(run_dir):
    return (run_dir / "report" / "report.html").read_text()


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_well_formed_file_that_loads_nothing(html):
    page = Page(html)
    assert page.open == []
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags and "url(" not in html
    # accuracy against steps and passes, by difficulty, after interventions, and two stages
    assert len(page.sources) == 4 + 2
    assert "A &lt;fake&gt; run" in html and "&lt;script&gt;alert(1)" in html and "fake &lt;run&gt;" in html


def test_heatmap_shows_tokens_weights_and_the_chunk_beside_each_latent(html):
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r'<tr><td class="muted">.*?</tr>', html)]
    assert rows[:3] == [
        ["1", "=", "0.71", "5", "0.20", "&lt;b&gt;", "0.09", "1", "*"],
        ["2", "␣", "0.50", "⏎", "0.30", "|", "0.20", "5", "="],
        ["3", "5", ";"],  # the CoT has a chunk more than there are latents
    ]
    assert 'class="right">right' in html


def test_json_and_markdown_hold_the_same_numbers(run_dir):
    report = json.loads((run_dir / "report" / "report.json").read_text())
    order = [(r["split"], r["model"]) for r in report["results"]]
    assert order == [(s, m) for s in ("test", "validation") for m in STEPS]
    # stage 1 started from cot here, so the cost of cot counts for stage1 and latent-sft
    seconds = {r["model"]: r["train_seconds"] for r in report["results"]}
    assert seconds == {"no-cot": 60.0, "cot": 90.5, "stage1": 290.5, "latent-sft": 590.5}
    assert report["results"][3]["examples_seen"] == 3 * 48_000
    markdown = (run_dir / "report" / "report.md").read_text()
    assert (
        "| latent-sft | test | 98.2 ± 0.4 | 1,000 | 12.1 | 1.0 | 15.1 | 100.0 | 0.0123 | 9 min 50 s | 144,000 |"
        in markdown
    )
    # no column for what nobody has, here the recall of the likeliest token alone
    assert "| latent-sft | test | 98.2 | 10.0 (-88.2 [-95.0, -85.0]) | 75.0 | 50.0 |\n" in markdown
    assert "| no-cot | test | 3" not in markdown.partition("Is the reasoning used?")[2]  # it has none
    assert "reconstructed" in markdown and "ECR@10" in markdown
    assert (run_dir / "report" / "accuracy_vs_steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_every_table_of_the_markdown(run_dir, html):
    lines = [line for line in (run_dir / "report" / "report.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[escape(cell) for cell in line[2:-2].split(" | ")] for line in lines if not line.startswith("| ---")]
    assert len(rows) == (1 + 8) + (1 + 3) + (1 + 4)  # results, interventions on test, latents
    for row in rows:
        tag = "th" if row[0] == "model" else "td"
        assert "".join(f"<{tag}>{cell}</{tag}>" for cell in row) in html


@pytest.mark.parametrize(("source", "seconds"), [("base", 5.0), ("cot", 12.0)])
def test_a_model_costs_every_stage_that_led_to_it_whatever_the_methods_are_called(tmp_path, source, seconds):
    write_stage(tmp_path, "cot", train_seconds=7.0)
    write_stage(tmp_path, "sim-cot", source, train_seconds=5.0)
    write_stage(tmp_path, "labels", "sim-cot")  # no training
    write_evaluation(tmp_path, "sim-cot", "test", {"model": "sim-cot", "split": "test", "summary": SMALL}, "sim-cot")
    write_evaluation(tmp_path, "soft-thinking", "test", {"model": "st", "split": "test", "summary": SMALL}, "cot")
    rows = {evaluation.row["model"]: evaluation.row for evaluation in read_run(tmp_path).evaluations}
    assert rows["sim-cot"]["train_seconds"] == seconds and rows["st"]["train_seconds"] == 7.0
    assert rows["sim-cot"]["examples_seen"] is None


def test_weights_of_a_stage_that_was_trained_again_since_cost_nothing_known(tmp_path):
    write_stage(tmp_path, "cot", train_seconds=7.0)
    write_evaluation(tmp_path, "cot", "test", {"model": "cot", "split": "test", "summary": SMALL}, "an older cot")
    assert read_run(tmp_path).evaluations[0].row["train_seconds"] is None


def test_a_run_with_one_explicit_model_only(tmp_path):
    path = tmp_path / "eval" / "my-model" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": "my-model", "split": "test", "summary": SMALL}))
    html = write_report(tmp_path, title="small").read_text()
    assert "0.0" in html and "What the latents hold" not in html and "Training" not in html
    assert Page(html).open == []


SMALL = {"accuracy": 0.0, "accuracy_se": None, "num_examples": 1, "reasoning_steps_mean": 0.0}


def test_no_results_and_damaged_results(tmp_path):
    with pytest.raises(ArtefactError, match="no evaluation results; run latent-sft eval first"):
        write_report(tmp_path, title="x")
    path = tmp_path / "eval" / "cot" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"model": "cot", "spl')
    with pytest.raises(ArtefactError, match=r"test\.json: damaged JSON"):
        write_report(tmp_path, title="x")
    path.write_text('{"model": "cot"}')
    with pytest.raises(ArtefactError, match="not an evaluation result"):
        write_report(tmp_path, title="x")
    assert not (tmp_path / "report").exists()


def test_curves_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 20, "train/loss": 2.0}\n{"step": 40, "train/loss": 1.5, "train/grad": NaN}\n'
        '{"step": 40, "train/loss": 1.6, "note": "resumed"}\n[1]\n{"step": 30, "train/loss": 1.8}\n{"step": 60, "tra'
    )
    assert read_curves(path) == {"train/loss": [(20, 2.0), (30, 1.8), (40, 1.6)]}


def test_labels_of_near_points_do_not_overlap():
    rows = [
        {"model": m, "split": "test", "accuracy": a, "accuracy_se": 0.01, "reasoning_steps_mean": 12.0}
        for m, a in (("a", 0.99), ("b", 0.985), ("c", 0.98), ("d", 0.4))
    ]
    figure = plots.accuracy_against(rows)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_a_gold_path_costs_more_than_it_shows_and_a_colour_is_the_same_everywhere():
    rows = [
        {
            "model": m,
            "kind": k,
            "split": "test",
            "accuracy": 0.5,
            "forward_passes_mean": 3.0,
            "reasoning_steps_mean": 2.0,
        }
        for m, k in (("r2/stage1", "stage1"), ("r2", "latent-sft"), ("r4", "latent-sft"))
    ]
    colours = plots.colours_of(rows)
    for key, names in ((plots.PASSES, ["r2", "r4"]), (plots.STEPS, ["r2/stage1", "r2", "r4"])):
        texts = plots.accuracy_against(rows, key).axes[0].texts
        assert {text.get_text().split()[0]: text.get_color() for text in texts} == {n: colours[n] for n in names}


def test_a_row_shows_the_prompt_the_heaviest_tokens_of_each_latent_and_the_answer():
    latents = [
        ShownLatent(entropy=0.5, tokens=[(f"t{n}", 0.7), ("$", 0.2), (" ", 0.1), ("no", 0.0)]) for n in range(18)
    ]
    shown = {"problem": "two and two", "thinker": "latent", "thought": "", "answer": "4", "num_steps": 18}
    solution = Solution(**shown, latents=latents, forward_passes=20, finished=True)
    figure = plots.thought_row(solution)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:6] == ["prompt", "two and two", "z1", "t0", "$", "' '"]
    assert texts[-6:] == ["z16 +2", "t15", "$", "' '", "answer", "4"]
    plots.to_bytes(figure, "png")
    assert plots.thought_row(dataclasses.replace(solution, latents=[])) is None


def test_figures_are_reproducible():
    rows = [{"model": "cot", "split": "test", "accuracy": 0.5, "reasoning_steps_mean": 3.0}]
    first, second = (plots.to_bytes(plots.accuracy_against(rows), "svg") for _ in range(2))
    assert first == second
    assert plots.training_curves({"train/learning_rate": [(1, 0.1)]}) is None
    assert plots.accuracy_by_cot_steps(rows) is None


def test_cells():
    assert accuracy({"accuracy": 0.9725, "accuracy_se": 0.0051}) == "97.2 ± 0.5"
    assert accuracy({"accuracy": 1.0, "accuracy_se": None}) == "100.0"
    assert percent(0.9725) == "97.2"
    assert [duration(s) for s in (59.4, 59.6, 3600, 7530)] == [
        "59 s",
        "1 min 00 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_the_terminal_shows_some_columns_of_the_same_table():
    table = result_table([{"model": "cot", "split": "test", **SMALL}])
    assert table.header == ["model", "split", "accuracy %", "n", "reasoning steps"]
    shown = table.terminal("title", ["model", "n", "accuracy %", "train time"])
    assert [column.header for column in shown.columns] == ["model", "accuracy\n%", "n"]
    assert [list(column.cells) for column in shown.columns] == [["cot"], ["0.0"], ["1"]]


def test_skipped_rows_stand_beside_the_accuracy_where_there_are_any():
    rows = [{"model": "cot", "split": "test", "accuracy": 0.5, "num_examples": 6}] * 2
    assert "skipped" not in result_table(rows).header
    header, cells = result_table([rows[0], {**rows[1], "skipped": {"bad row": 1, "too long": 1200}}])
    assert header[2:5] == ["accuracy %", "n", "skipped"]
    assert [line[4] for line in cells] == ["–", "1,201 (1 bad row, 1,200 too long)"]


def test_what_models_without_latents_reach_is_a_line_to_win_against():
    rows = [
        {
            "model": name, "kind": "cot", "split": "test", "accuracy": height, plots.PASSES: cost,
            "latent_steps_max": most,
        }
        for name, height, cost, most in (
            ("no-cot", 0.1, 2, 0), ("short", 0.6, 9, 0), ("shorter", 0.5, 12, 0), ("cot", 1.0, 24, 0),
            ("ours", 0.9, 6, 4),
        )
    ]  # fmt: skip
    (line,) = [
        line
        for line in plots.accuracy_against(rows, plots.PASSES).axes[0].lines
        if line.get_drawstyle() == "steps-post"
    ]
    assert [*line.get_xdata()] == [2, 9, 12, 24] and [*line.get_ydata()] == [0.1, 0.6, 0.6, 1.0]


def test_accuracy_by_number_of_latents():
    row = {"model": "ours", "kind": "latent-sft", "split": "test", "accuracy": 0.9, "latent_steps_mean": 3.4}
    sweep = {"2": {"accuracy": 0.3, "accuracy_se": 0.1}, "10": {"accuracy": 0.8, "accuracy_se": 0.1}}
    assert plots.accuracy_by_latents([row]) is None
    axes = plots.accuracy_by_latents([{**row, "latent_sweep": sweep}, row]).axes[0]
    points = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert (2, 10, 0.3, 0.8) in points and (3.4, 0.9) in points
