"""Walking a graph: order, failures, what another process is making, and the stage that trains beside the others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from latent_sft.config.load import load_config
from latent_sft.errors import ArtefactError, Interrupted, TrainingError
from latent_sft.experiment import run
from latent_sft.experiment.graph import Node
from latent_sft.runs import CLAIM, Step, lock


@pytest.fixture
def work(tmp_path):
    """An opened experiment as far as a walk looks at it."""

    def step(name: str) -> Step:
        return Step(directory=tmp_path / name, inputs={})

    return SimpleNamespace(config=load_config(None), directory=tmp_path, step=step)


class Graph(dict):
    """Nodes that record in `made` when they are made, and raise what `errors` holds for them."""

    def __init__(self, *edges: str) -> None:
        self.made: list[str] = []
        self.errors: dict[str, BaseException] = {}
        for edge in edges:
            name, _, needs = edge.partition(": ")
            word = name.partition(" ")[0]
            self[name] = Node(
                name=name, meaning="", folder=name, needs=tuple(needs.split()), command=(word,), inputs=dict,
                make=lambda _, name=name: self.make(name),
            )  # fmt: skip

    def make(self, name: str) -> None:
        if name in self.errors:
            raise self.errors[name]
        self.made.append(name)


def test_nodes_are_made_in_order_and_each_is_reported(work, caplog):
    graph, ends = Graph("a", "b: a", "c: a", "d: b c"), []
    with caplog.at_level("INFO", logger="latent_sft"):
        run.walk(graph, work, lambda: ends.append(list(graph.made)))
    assert graph.made == ["a", "b", "c", "d"]
    assert ends == [["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    assert [record.message for record in caplog.records] == ["[1/4] a", "[2/4] b", "[3/4] c", "[4/4] d"]


@pytest.mark.parametrize("error", [TrainingError("nan"), RuntimeError("out of memory")])
def test_a_node_that_fails_stops_only_what_needs_it(work, error, caplog):
    graph = Graph("a", "b: a", "c", "d: b c", "e: d", "f: c")
    graph.errors["b"] = error
    with pytest.raises(type(error), match=str(error)):
        run.walk(graph, work)
    assert graph.made == ["a", "c", "f"]
    assert f"b failed, and so d, e left out: {error}" in caplog.text


@pytest.mark.parametrize("error", [ArtefactError("of other settings"), Interrupted("stopped"), KeyboardInterrupt()])
def test_a_mistake_of_the_user_and_a_stop_end_the_walk(work, error):
    graph = Graph("a", "b", "c")
    graph.errors["b"] = error
    with pytest.raises(type(error)):
        run.walk(graph, work)
    assert graph.made == ["a"]


def test_what_another_process_is_making_is_waited_for_and_others_go_first(work, tmp_path, caplog):
    graph = Graph("a", "b: a", "c")
    code = (
        "import sys, time, pathlib; from latent_sft.runs import lock; f = pathlib.Path(sys.argv[1])\n"
        "held = lock(f / '.claim'); print('held', flush=True)\n"
        "while not (f.parent / 'free').exists(): time.sleep(0.02)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"

        def release() -> None:
            while not graph.made:
                time.sleep(0.02)
            time.sleep(0.5)
            (tmp_path / "free").touch()

        threading.Thread(target=release).start()
        with caplog.at_level("INFO", logger="latent_sft"):
            run.walk(graph, work)
    assert graph.made == ["c", "a", "b"]
    assert f"[1/3] a: waits for process {other.pid} on " in caplog.text
    assert lock(tmp_path / "b" / CLAIM) is not None  # nothing is held any longer


@pytest.fixture
def beside(work, monkeypatch):
    """Return a function: Python code -> `walk` of a graph whose first stage runs that code beside the others."""
    work.config = load_config(None, ["launch.concurrent_baseline=true"])

    def walk(code: str, graph: Graph) -> None:
        monkeypatch.setattr(run, "build_command", lambda *_: [sys.executable, "-c", code])
        run.walk(graph, work)

    return walk


STAGES = ("no-cot", "cot", "stage2: cot", "eval no-cot: no-cot", "eval cot: cot", "export: stage2", "report: eval cot")


def test_a_stage_that_only_evaluations_need_trains_beside_the_others(beside, tmp_path):
    graph = Graph(*STAGES)
    code = f"import time, pathlib; print('hello'); go = pathlib.Path({str(tmp_path / 'go')!r})"
    code += "\nwhile not go.exists(): time.sleep(0.02)"
    graph["report"] = Node(
        name="report", meaning="", folder="report", command=("report",), needs=("eval cot",),
        make=lambda _: (graph.make("report"), (tmp_path / "go").touch()),
    )  # fmt: skip
    beside(code, graph)
    # no-cot is not in the list: it was made elsewhere, and only its evaluation waited for it
    assert graph.made == ["cot", "stage2", "eval cot", "export", "report", "eval no-cot"]
    assert (tmp_path / "no-cot/console.log").read_text() == "hello\n"


def test_a_failing_baseline_fails_the_run_and_names_its_console(beside, tmp_path):
    graph = Graph(*STAGES)
    with pytest.raises(TrainingError, match=r"no-cot: ended with status 3; its messages are in .*console\.log"):
        beside("print('the reason'); raise SystemExit(3)", graph)
    assert "the reason" in (tmp_path / "no-cot/console.log").read_text()
    assert graph.made == ["cot", "stage2", "eval cot", "export", "report"]


def test_a_run_that_ends_takes_its_baseline_with_it(beside, tmp_path):
    graph = Graph(*STAGES)
    graph.errors["cot"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        beside("import time; time.sleep(60)", graph)
    assert lock(tmp_path / "no-cot" / CLAIM) is not None


def test_a_finished_baseline_is_not_started_again(beside, work):
    step, graph = work.step("no-cot"), Graph(*STAGES)
    step.begin(seed=0)
    step.finish()
    beside("raise SystemExit(3)", graph)
    assert graph.made[0] == "no-cot"
