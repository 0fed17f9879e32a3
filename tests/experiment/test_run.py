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
    assert f"b failed, left out: d, e ({error})" in caplog.text


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
    assert "[1/3] a: waits for another process, which makes it" in caplog.text
    assert lock(tmp_path / "b" / CLAIM) is not None  # nothing is held any longer


@pytest.fixture
def beside(work, monkeypatch, tmp_path):
    """Return a function: Python code -> `walk` of a graph whose first stage runs that code beside the others."""
    work.config = load_config(None, ["launch.concurrent_baseline=true"])
    real = subprocess.Popen

    def walk(code: str, graph: Graph) -> None:
        def start(command: list[str], **options: object) -> subprocess.Popen:
            assert command[2:] == ["latent_sft.cli", "train", "no-cot", str(tmp_path / "config.yaml")]
            started.append(real([sys.executable, "-c", code], **options))
            return started[-1]

        monkeypatch.setattr(run.subprocess, "Popen", start)
        run.walk(graph, work)

    started = walk.started = []
    return walk


STAGES = ("no-cot", "cot", "stage2: cot", "eval no-cot: no-cot", "eval cot: cot", "export: stage2", "report: eval cot")


def test_a_stage_that_only_evaluations_need_trains_beside_the_others_and_comes_last(beside, tmp_path, caplog):
    graph = Graph(*STAGES)
    beside("print('hello')", graph)
    assert graph.made == ["cot", "stage2", "eval cot", "export", "report", "no-cot", "eval no-cot"]
    # cot is needed by a stage, and stage2 by an export
    assert len(beside.started) == 1 and beside.started[0].poll() is not None


def test_a_baseline_that_fails_beside_is_made_here_and_its_failure_is_the_runs(beside):
    graph = Graph(*STAGES)
    graph.errors["no-cot"] = TrainingError("nan")
    with pytest.raises(TrainingError, match="nan"):
        beside("raise SystemExit(3)", graph)
    assert graph.made == ["cot", "stage2", "eval cot", "export", "report"]


def test_a_run_that_ends_takes_its_baseline_with_it(beside, tmp_path):
    graph = Graph(*STAGES)
    graph.errors["cot"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        beside("import time; time.sleep(60)", graph)
    assert beside.started[0].poll() is not None


def test_a_finished_baseline_is_not_started_again(beside, work):
    for name in ("no-cot", "stage2"):
        step = work.step(name)
        step.begin(seed=0)
        step.finish()
    graph = Graph(*STAGES)
    beside("", graph)
    assert graph.made[0] == "no-cot" and not beside.started
