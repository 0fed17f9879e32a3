"""ProsQA-style graph reasoning: does an entity reach one concept or another through a chain of `Every A is a B`?

The task is that of Hao et al. 2024 (arXiv 2412.06769). The construction is ours, with constants fitted to the
300 problems of the public validation file: generated and public problems agree in nodes, edges, in-degrees, entities
and steps (`tests/data/test_synthetic.py` holds the numbers). Names and concepts are those of that file, so that a model
trained here can be evaluated there; no problem of it is used.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from latent_sft.errors import ConfigError

NAMES = tuple("Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split())
CONCEPTS = tuple(
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus".split()
)

MEAN_PARENTS = 1.5  # of the Poisson number of edges into a node
POOLS = (0.35, 0.45, 0.20)  # parents from descendants of root 0 only, of root 1 only, or from all nodes
DEPTH_WEIGHT = 1.5  # a candidate parent weighs 1 + DEPTH_WEIGHT * depth, which makes chains long
MAX_GRAPHS = 100_000  # drawn for one problem; full-size graphs with paths of 3 to 6 need two or three
LONGEST_PATH = 8  # longer shortest paths practically never occur (public file: 3 to 6)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphProblem:
    """A problem with its chain of thought (`steps`, a shortest path from the entity to the answer's concept)."""

    problem: str
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class _Graph:
    # nodes 0 and 1 are the two roots; reached[i] is a bit set of the roots from which i can be reached
    children: list[list[int]]
    num_parents: list[int]
    reached: list[int]


def generate_problem(rng: random.Random, *, min_steps: int, max_steps: int, num_nodes: int) -> GraphProblem:
    """Draw a problem whose shortest path has `min_steps` to `max_steps` edges.

    The question's entity is the root with the deepest leaf that only it reaches; that leaf is the answer. The wrong
    option is a leaf that only the other root reaches, and not in one step if the answer is farther, so that neither
    option stands out by itself.

    Raises:
        ConfigError: hardly a graph of so few nodes has so long a path.

    Args:
        rng: source of randomness.
        min_steps: at most LONGEST_PATH.
        max_steps: at least `min_steps`.
        num_nodes: before nodes without edges are dropped; smaller graphs are easier and have shorter paths.
    """
    for _ in range(MAX_GRAPHS):
        graph = _sample_graph(rng, num_nodes)
        entities = sum(bool(out) and not graph.num_parents[node] for node, out in enumerate(graph.children))
        paths = [_shortest_paths(graph, root) for root in (0, 1)]
        leaves = [[n for n in paths[root] if graph.reached[n] == root + 1 and not graph.children[n]] for root in (0, 1)]
        ends = [(len(paths[root][n]) - 1, rng.random(), root, n) for root in (0, 1) for n in leaves[root] if n != root]
        if not ends or entities > len(NAMES):
            continue
        num_steps, _, root, target = max(ends)  # the random number decides between equally deep leaves
        # an option right behind an entity could be told from one behind a concept without following a chain
        wrong = [n for n in leaves[1 - root] if n != 1 - root and len(paths[1 - root][n]) > min(2, num_steps)]
        if wrong and min_steps <= num_steps <= max_steps:
            return _in_words(rng, graph, paths[root][target], rng.choice(wrong))
    raise ConfigError(
        f"data.synthetic.min_steps: none of {MAX_GRAPHS:,} graphs of {num_nodes} nodes has a path of {min_steps} to "
        f"{max_steps} steps; expected fewer steps, or a larger data.synthetic.max_nodes."
    )


def _sample_graph(rng: random.Random, num_nodes: int) -> _Graph:
    children: list[list[int]] = [[], []]
    num_parents, reached, weight = [0, 0], [1, 2], [1.0, 1.0]
    only: dict[int, list[int]] = {0: [], 1: [0], 2: [1], 3: []}
    for node in range(2, num_nodes):
        pool = rng.choices((only[1], only[2], range(node)), POOLS)[0]
        count = _poisson(rng, MEAN_PARENTS)
        # the first arrivals of exponential clocks are a weighted sample without replacement
        parents = sorted(pool, key=lambda n: rng.expovariate(weight[n]))[:count] if count else []
        mask = 0
        for parent in parents:
            children[parent].append(node)
            mask |= reached[parent]
        children.append([])
        num_parents.append(len(parents))
        weight.append(DEPTH_WEIGHT + min(weight[n] for n in parents) if parents else 1.0)
        reached.append(mask)
        only[mask].append(node)
    return _Graph(children, num_parents, reached)


def _poisson(rng: random.Random, mean: float) -> int:
    # Knuth's product method; `random` has no Poisson and a mean of 1.5 needs few factors
    count, product, floor = 0, rng.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= rng.random()
    return count


def _shortest_paths(graph: _Graph, root: int) -> dict[int, list[int]]:
    paths, frontier = {root: [root]}, [root]
    while frontier:
        following: list[int] = []
        for node in frontier:
            for child in graph.children[node]:
                if child not in paths:
                    paths[child] = [*paths[node], child]
                    following.append(child)
        frontier = following
    return paths


def _in_words(rng: random.Random, graph: _Graph, path: list[int], wrong: int) -> GraphProblem:
    used = [n for n, out in enumerate(graph.children) if out or graph.num_parents[n]]
    sources = [n for n in used if not graph.num_parents[n]]
    word = dict(zip(sources, rng.sample(NAMES, len(sources)), strict=True))
    concepts = [n for n in used if graph.num_parents[n]]
    word |= dict(zip(concepts, rng.sample(CONCEPTS, len(concepts)), strict=True))

    def statement(parent: int, child: int) -> str:
        return f"{'' if not graph.num_parents[parent] else 'Every '}{word[parent]} is a {word[child]}."

    statements = [statement(parent, child) for parent in used for child in graph.children[parent]]
    rng.shuffle(statements)
    options = [word[path[-1]], word[wrong]]
    rng.shuffle(options)
    question = f"Is {word[path[0]]} a {options[0]} or {options[1]}?"
    return GraphProblem(
        problem=" ".join([*statements, question]),
        steps=tuple(statement(parent, child) for parent, child in itertools.pairwise(path)),
        answer=f"{word[path[0]]} is a {word[path[-1]]}.",
    )
