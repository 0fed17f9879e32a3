"""Shorter chains of thought, cut by a rule: the text baselines that a compressed latent thought is compared with."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from latent_sft.config.schema import ShortenConfig
from latent_sft.data.formats import EQUATION, Record, step_starts
from latent_sft.errors import DataError


def shortened(record: Record, config: ShortenConfig) -> Record:
    """Return a record with less of its chain of thought; problem and answer are the same.

    What stands behind a step, such as a line break, is kept or left out with it. A row with fewer steps than
    `drop_left` leaves out has none left.

    Raises:
        DataError: the steps are not parts of the CoT in their order, or one says no result; without the row's place,
            which the caller knows.
    """
    if config.rule == "none" or not record.cot:
        return record
    try:
        starts = step_starts(record.cot, record.steps)
    except DataError as error:
        raise DataError(f"{error} (data.shorten needs them).") from error
    # what stands before the first step belongs to it
    parts = [record.cot[start:end] for start, end in pairwise([0, *starts[1:], len(record.cot)])]
    if config.rule == "drop_left":
        parts = parts[config.steps :]
    elif config.rule == "every_r":
        last = len(parts) - 1
        parts = [part for i, part in enumerate(parts) if (i + 1) % config.steps == 0 or i == last]
    else:
        parts = [_result(part) for part in parts]
    return dataclasses.replace(record, cot="".join(parts).strip(), steps=tuple(part.strip() for part in parts))


def _result(part: str) -> str:
    # of every equation where some are marked, else of the whole step; the space behind it stays
    step = part.rstrip()
    found = []
    for equation in EQUATION.findall(step) or [step]:
        _, sign, result = equation.rpartition("=")
        result = result.removesuffix(">>").strip()
        if not sign or not result:
            raise DataError(
                f"field 'cot': the step {step.strip()!r:.80} has no result behind '='; expected one in every step "
                "(data.shorten.rule=results keeps nothing else)."
            )
        found.append(result)
    return " ".join(found) + part[len(step) :]
