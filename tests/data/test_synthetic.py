"""Generators: seeded, disjoint, right by an independent reading of the problem; ProsQA as in the public file."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest

from latent_sft.config.schema import FieldsConfig, SyntheticConfig
from latent_sft.data import prosqa
from latent_sft.data.detect import parse_row
from latent_sft.data.formats import Record, RowFormat, split_steps
from latent_sft.data.readers import read_rows
from latent_sft.data.synthetic import ARITHMETIC_LARGEST, MODULAR_NAMES, MODULAR_VERBS, generate
from latent_sft.errors import ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {"num_train": 400, "num_validation": 50, "num_test": 60}
TASKS = ("modular", "arithmetic", "prosqa")


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_problems_and_no_problem_twice(task: str) -> None:
    splits = generate(SyntheticConfig(task=task, **SMALL))
    assert {name: len(found) for name, found in splits.items()} == {"train": 400, "validation": 50, "test": 60}
    problems = [record.problem for found in splits.values() for record in found]
    assert len(set(problems)) == len(problems)
    assert splits == generate(SyntheticConfig(task=task, **SMALL))
    longer = generate(SyntheticConfig(task=task, **{**SMALL, "num_train": 410}))
    assert longer["test"] == splits["test"]
    assert longer["train"][:400] == splits["train"]
    assert generate(SyntheticConfig(task=task, **SMALL, seed=1))["test"] != splits["test"]


def test_hash_randomisation_changes_nothing() -> None:
    code = """
import hashlib
from latent_sft.config.schema import SyntheticConfig
from latent_sft.data.synthetic import generate
made = [generate(SyntheticConfig(task=task, num_train=20, num_validation=2, num_test=2)) for task in TASKS]
print(hashlib.sha256(repr(made).encode()).hexdigest())
""".replace("TASKS", repr(TASKS))
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_modular_problems_follow_from_their_words() -> None:
    sign_of = {verb: sign for sign, verbs in MODULAR_VERBS.items() for verb in verbs}
    assert len(sign_of) == sum(map(len, MODULAR_VERBS.values()))  # no verb means two things
    records = generate(SyntheticConfig(**{**SMALL, "num_train": 3000}))["train"]
    times = 0
    for record in records:
        sentences = record.problem.split(" . ")
        name, has, start = sentences[0].split()
        assert (name in MODULAR_NAMES, has, sentences[-1]) == (True, "has", "how many ?")
        value, steps = int(start), []
        for sentence in sentences[1:-1]:
            verb, operand = sentence.split()
            sign, k = sign_of[verb], int(operand)
            assert (2 if sign == "*" else 1) <= k <= 5
            after = {"+": value + k, "-": value - k, "*": value * k}[sign] % 11
            steps.append(f"{value} {sign} {k} = {after} ;")
            value = after
            times += sign == "*"
        assert record.steps == tuple(steps)
        assert 3 <= len(steps) <= 5
        assert record.cot == " ".join(steps)
        assert len(record.cot.split()) == 6 * len(steps)
        assert record.answer == record.cot_answer == str(value)
    assert times / sum(len(r.steps) for r in records) == pytest.approx(0.4, abs=0.02)
    words = {word for r in records for word in f"{r.problem} {r.cot}".split()}
    assert 90 <= len(words) <= 130


def test_arithmetic_problems_have_the_gsm8k_aug_form() -> None:
    config = SyntheticConfig(task="arithmetic", min_steps=2, max_steps=6, **SMALL)
    for record in generate(config)["train"]:
        assert split_steps(record.cot) == record.steps
        assert 2 <= len(record.steps) <= 6
        value = None
        for step in record.steps:
            left, sign, right, result = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step).groups()  # type: ignore[union-attr]
            assert value is None or int(left) == value
            assert eval(f"{left}{sign}{right}") == int(result)
            assert right in re.findall(r"\d+", record.problem)
            value = int(result)
            assert 1 <= value <= ARITHMETIC_LARGEST
        assert record.answer == str(value)
        assert record.problem.endswith("?")


def edges_of(problem: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+) is a (\w+)\.", problem)


def distances(edges: list[tuple[str, str]], start: str) -> dict[str, int]:
    found, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for parent, child in edges:
            if parent == node and child not in found:
                found[child] = found[node] + 1
                queue.append(child)
    return found


def check_prosqa(record: Record) -> None:
    edges = edges_of(record.problem)
    assert len(set(edges)) == len(edges)
    root, first, second = re.search(r"Is (\w+) a (\w+) or (\w+)\?$", record.problem).groups()  # type: ignore[union-attr]
    answer = re.fullmatch(rf"{root} is a (\w+)\.", record.answer).group(1)  # type: ignore[union-attr]
    wrong = second if answer == first else first
    reached = distances(edges, root)
    assert wrong not in reached
    assert any(wrong in distances(edges, other) for other in prosqa.NAMES if other != root)
    parents = {parent for parent, _ in edges}
    assert answer not in parents
    assert wrong not in parents  # both options are leaves
    path = [edge for step in record.steps for edge in edges_of(step)]
    assert len(path) == reached[answer]  # a shortest path ...
    assert set(path) <= set(edges)  # ... of given statements ...
    assert path[0][0] == root
    assert path[-1][1] == answer
    assert all(a[1] == b[0] for a, b in pairwise(path))  # ... that hang together
    children = {child for _, child in edges}
    assert children <= set(prosqa.CONCEPTS)
    assert parents - children <= set(prosqa.NAMES)
    assert record.cot == "\n".join(record.steps)


def test_prosqa_problems_are_decidable_and_the_public_ones_pass_the_same_check() -> None:
    for record in generate(SyntheticConfig(task="prosqa", max_steps=6, **SMALL))["train"]:
        check_prosqa(record)
    row_format = RowFormat(name="steps", fields=FieldsConfig())
    for row in read_rows(str(FIXTURES / "prosqa_valid_10.json")):
        check_prosqa(parse_row(row.value, row_format, default_id=str(row.line)))


def test_prosqa_has_the_distribution_of_the_public_validation_file() -> None:
    records = generate(SyntheticConfig(task="prosqa", min_steps=3, max_steps=6, num_train=1500, num_test=1))["train"]
    graphs = [edges_of(r.problem) for r in records]
    nodes = [{node for edge in edges for node in edge} for edges in graphs]
    in_degrees = [sum(child == node for _, child in edges) for edges in graphs for node in {c for _, c in edges}]
    reached = [len(distances(e, r.steps[0].split()[0])) for e, r in zip(graphs, records, strict=True)]
    # (generated, mean and standard deviation over the 300 public problems)
    for name, values, mean, deviation in (
        ("nodes", [len(n) for n in nodes], 22.82, 2.04),
        ("statements", [len(edges) for edges in graphs], 36.26, 5.63),
        ("steps", [len(r.steps) for r in records], 3.75, 0.75),
        ("entities", [sum(node in prosqa.NAMES for node in n) for n in nodes], 2.51, 0.73),
        ("reached from the entity asked about", reached, 13.37, 2.72),
    ):
        assert statistics.mean(values) == pytest.approx(mean, rel=0.04), name
        assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.15), name
    shares = [sum(d == k for d in in_degrees) / len(in_degrees) for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.491, 0.312, 0.139, 0.042], abs=0.02)
    first = [r.answer.split()[-1][:-1] == re.search(r"a (\w+) or", r.problem).group(1) for r in records]  # type: ignore[union-attr]
    assert statistics.mean(first) == pytest.approx(0.5, abs=0.05)


def test_impossible_requests_are_errors() -> None:
    few = SyntheticConfig(modulus=2, min_steps=1, max_steps=1, num_train=50_000)
    with pytest.raises(ConfigError, match=r"data\.synthetic\.num_train: got 50000, but after \d+ there is hardly"):
        generate(few)
    with pytest.raises(ConfigError, match=r"data\.synthetic\.min_steps: got 9, expected at most 8 for task prosqa"):
        generate(SyntheticConfig(task="prosqa", min_steps=9, max_steps=9))


def test_small_prosqa_graphs_are_for_training_only() -> None:
    settings = {"task": "prosqa", "max_steps": 6, **SMALL}
    mixed, full = generate(SyntheticConfig(min_nodes=6, **settings)), generate(SyntheticConfig(**settings))
    assert mixed["validation"] == full["validation"] and mixed["test"] == full["test"]

    def statements(records: list[Record]) -> list[int]:
        return [record.problem.count(" is a ") for record in records]

    assert min(statements(mixed["train"])) < 10 < 25 < max(statements(mixed["train"]))
    assert min(statements(full["train"])) > min(statements(mixed["train"]))
    for record in mixed["train"]:
        check_prosqa(record)


@pytest.mark.parametrize("key", ["min_nodes", "max_nodes"])
@pytest.mark.parametrize("nodes", [4, 29])
def test_graph_sizes_out_of_range_are_refused(key: str, nodes: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.synthetic\.{key}: got {nodes}, expected 5 to "):
        SyntheticConfig(task="prosqa", **{key: nodes})


def test_all_splits_of_small_prosqa_graphs_are_small() -> None:
    splits = generate(SyntheticConfig(task="prosqa", min_nodes=6, max_nodes=8, min_steps=2, max_steps=4, **SMALL))
    for split, records in splits.items():
        for record in records:
            check_prosqa(record)
            words = set(record.problem.replace(".", "").replace("?", "").split())
            assert len(words & {*prosqa.NAMES, *prosqa.CONCEPTS}) <= 8
            assert split == "train" or 2 <= len(record.steps) <= 4


@pytest.mark.parametrize("nodes", [7, 28])
def test_neither_prosqa_option_stands_out_without_following_a_chain(nodes: int) -> None:
    """Small graphs once had the wrong option right behind the other entity; a model that never chains was at 95 %."""
    settings = {"min_nodes": nodes, "max_nodes": nodes, "min_steps": 2, "max_steps": 6}
    for record in generate(SyntheticConfig(task="prosqa", **settings, **SMALL))["train"]:
        behind_concepts = {child for parent, child in edges_of(record.problem) if parent in prosqa.CONCEPTS}
        options = re.search(r"Is \w+ a (\w+) or (\w+)\?$", record.problem).groups()  # type: ignore[union-attr]
        assert set(options) <= behind_concepts


def test_paths_too_long_for_a_graph_are_refused_instead_of_searched_for_ever() -> None:
    with pytest.raises(ConfigError, match=r"min_steps: none of 100,000 graphs of 6 nodes has a path of 5 to 8 steps"):
        generate(SyntheticConfig(task="prosqa", min_nodes=6, max_nodes=6, min_steps=5, max_steps=8, **SMALL))
