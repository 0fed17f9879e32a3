"""How long a run will take: the floor of every call and this machine's matrix products, times what experience says."""

from __future__ import annotations

from eval.speed import floor
from eval.speed.cases import Case

# share of the matrix-product rate that a path reaches of its own operations
REACHED = {"plain": 0.4, "fast": 0.5}
# a model call that does next to nothing, in seconds, by number of layers
CALL = 0.0015
# a fresh process until its first step: imports and random weights
START = 8.0


def of_call(case: Case, path: str, rate: float) -> float:
    """Return the seconds that one call of a path will take, at `rate` operations a second."""
    if case.part in ("decode", "step", "quickstart"):
        return _decoding(case, path, rate)
    if path == "fast":
        return floor.of_case(case) / rate / REACHED["fast"]
    return floor.of_plain(case) / rate / REACHED["plain"] * case.items[case.paths.index(path)] / max(case.items)


def _decoding(case: Case, path: str, rate: float) -> float:
    steps = (*case.cot, 21)[0] + case.answer
    words = (path if case.part == "decode" else case.name.split(",")[0]).split()
    batch = 1 if path == "plain" else int(words[-1])
    rounds = -(-case.items[case.paths.index(path)] // batch)
    work = floor.Work(batch, batch * (case.prompt + steps), batch)
    return rounds * steps * (case.size.layers * CALL + floor.flops(case.size, work, backward=False) / rate / 0.5)
