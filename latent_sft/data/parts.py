"""A batch of one row, read back as parts: what the model reads there, what it is to predict, what a latent covers.

Knows the two shapes that batches have: one sequence (`data.collate`), and prompt, latents and tail apart (methods that
think in hidden states). Nothing here says what a stage trains on; the batch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from latent_sft.data.collate import Batch
from latent_sft.method.layout import Kind, split_cot
from latent_sft.method.types import LatentSpec

Read = Callable[[int], str]
"""Token id -> its text."""
Part = dict[str, Any]
"""`part`: its name; `reads`: texts; `learns`: texts to be predicted at these places; of latents `covers`: texts."""


class _Cell(NamedTuple):
    """One position."""

    name: str
    reads: str
    learns: list[str]


def parts_of(batch: Batch, row: Mapping[str, Any], spec: LatentSpec, read: Read, *, labels: bool = True) -> list[Part]:
    """Return the parts of a batch of one row, in the order in which they are read.

    Args:
        batch: made by a stage, of this row alone.
        row: the tokenised row.
        spec: settings.
        read: token id -> text.
        labels: whether latents in the batch mean something; those of a model that is not there do not.
    """
    number = int((batch["kind"] == Kind.LATENT).sum())
    if "prompt_ids" in batch:
        cells = _apart(batch, row, spec, read, number)
        remaining = sum(cell.name == "CoT" for cell in cells)
        cut = [read(token) for token in row["cot"][: len(row["cot"]) - remaining]]
        parts = [part | ({"covers": cut} if part["part"].startswith("latents") else {}) for part in _joined(cells)]
        if "teacher_ids" in batch:
            parts += _named("teacher: ", _joined(_tail(batch, "teacher_", row, spec, read)))
        return parts
    segments = split_cot(row["cot"], row["segment_lengths"])
    covers = [[read(token) for token in part] for part in ([[]] * (number - len(segments)) + segments)]
    if "latent_ids" in batch and labels:
        mixed = zip(batch["latent_ids"][0].tolist(), batch["latent_weights"][0].tolist(), strict=True)
        covers = [[read(t) for t, w in zip(ids, weights, strict=True) if w > 0] for ids, weights in mixed]
    parts = _joined(_sequence(batch, "encoder_", row, spec, read)) if "encoder_ids" in batch else []
    parts = _named("encoder: ", parts) + _joined(_sequence(batch, "", row, spec, read))
    for part in parts:
        kind, _, at = part["part"].partition(" ")
        if kind == "latent":
            part["covers"] = covers[int(at) - 1]
    return parts


def _sequence(batch: Batch, prefix: str, row: Mapping[str, Any], spec: LatentSpec, read: Read) -> list[_Cell]:
    ids, kinds, branches = (batch[f"{prefix}{key}"][0].tolist() for key in ("ids", "kind", "branch"))
    time = batch[f"{prefix}time"][0].tolist() if f"{prefix}time" in batch else list(range(len(ids)))
    order = sorted((p for p in range(len(ids)) if kinds[p] != Kind.PAD), key=time.__getitem__)
    learns: dict[int, list[str]] = {}
    if not prefix:
        for at, token in _pairs(batch, "target_index", "targets"):
            learns.setdefault(at, []).append(read(token))
        for at, latent in _pairs(batch, "kl_index", "kl_latent"):
            learns.setdefault(at, []).append(f"latent {latent + 1}")
    text = [p for p in order if kinds[p] in (Kind.TEXT, Kind.TAIL)]
    names = dict(zip(text, _names([ids[p] for p in text], row, spec), strict=True))
    made = {Kind.LATENT: ("latent", "z"), Kind.CHUNK: ("CoT after latent", ""), Kind.MARKER: ("marker", "m")}
    cells = []
    for p in order:
        name, reads = names.get(p, ""), read(ids[p])
        if not name:
            name, letter = made[kinds[p]]
            name, reads = f"{name} {branches[p] + 1}", f"{letter}{branches[p] + 1}" if letter else reads
        cells.append(_Cell(name, reads, learns.get(p, [])))
    return cells


def _apart(batch: Batch, row: Mapping[str, Any], spec: LatentSpec, read: Read, number: int) -> list[_Cell]:
    prompt = batch["prompt_ids"][0, : int(batch["prompt_length"][0])].tolist()
    cells = [_Cell("prompt", read(token), []) for token in prompt]
    cells += [_Cell(f"latents 1-{number}", f"z{i + 1}", []) for i in range(number)]
    width = 1 + batch["thought_mask"].shape[1] if "thought_mask" in batch else 1
    for at, token in _pairs(batch, "step_index", "step_targets"):  # of every pass the same
        place = cells[len(prompt) - 1 + at % width].learns
        if read(token) not in place:
            place.append(read(token))
    first, *tail = _tail(batch, "", row, spec, read)
    cells[-1].learns.extend(first.learns)
    return cells + tail


def _tail(batch: Batch, prefix: str, row: Mapping[str, Any], spec: LatentSpec, read: Read) -> list[_Cell]:
    """Return the state before a part, and the part's positions."""
    key = prefix.rstrip("_") or "tail"
    ids = batch[f"{key}_ids"][0, : int(batch[f"{key}_length"][0])].tolist()
    names = _names([*row["prompt"], *ids], row, spec)[len(row["prompt"]) :]
    cells = [_Cell("before", "", []), *(_Cell(name, read(t), []) for name, t in zip(names, ids, strict=True))]
    for at, token in _pairs(batch, f"{prefix}target_index", f"{prefix}targets"):
        cells[at].learns.append(read(token))
    return cells


def _names(ids: Sequence[int], row: Mapping[str, Any], spec: LatentSpec) -> list[str]:
    """Return what each text token belongs to; the last one of the answer may be left out, the end of an encoder is."""
    start, end = len(row["prompt"]), len(spec.end_think_ids)
    rest, tail = list(ids[start:]), [*spec.end_think_ids, *row["answer"]]
    size = next((n for n in (len(tail), len(tail) - 1) if rest[-n:] == tail[:n]), 0)
    closing = ["</think>"] * min(size, end) + ["answer"] * (size - end)
    return ["prompt"] * start + ["CoT"] * (len(rest) - size) + closing


def _pairs(batch: Batch, index: str, values: str) -> list[tuple[int, int]]:
    return list(zip(batch[index].tolist(), batch[values].tolist(), strict=True)) if index in batch else []


def _joined(cells: Sequence[_Cell]) -> list[Part]:
    parts = []
    for name, group in groupby(cells, key=lambda cell: cell.name):
        inside = list(group)
        reads = [cell.reads for cell in inside if cell.reads]
        parts.append({"part": name, "reads": reads, "learns": [text for cell in inside for text in cell.learns]})
    return parts


def _named(before: str, parts: Sequence[Part]) -> list[Part]:
    return [{**part, "part": f"{before}{part['part']}"} for part in parts]
