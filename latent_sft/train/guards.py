"""Stops with a reason where training would go on to no purpose, or could not begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from latent_sft.config.training import TrainConfig
from latent_sft.errors import TrainingError
from latent_sft.runs import write_json

NON_FINITE_FILE = "non_finite.json"


def with_ids(
    rows: list[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
) -> dict[str, Any]:
    """Return a batch that carries the ids of its rows, `row_ids`."""
    return {**collate(rows), "row_ids": [row["id"] for row in rows]}


def check_rows(num_rows: int, train: TrainConfig, section: str, num_processes: int) -> None:
    """Refuse a training set that cannot fill one optimizer step: its processes would run out of rows.

    Raises:
        TrainingError: with the numbers.
    """
    if train.max_tokens:
        return  # `TokenBatchSampler` cuts batches to the job's size and checks for itself
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * num_processes
    if num_rows < per_step:
        how = "Lower global_batch_size" if train.global_batch_size else "Lower one of the three"
        made = f"gradient_accumulation_steps={train.gradient_accumulation_steps} x {num_processes} processes"
        raise TrainingError(
            f"{section}: {num_rows} training rows, but one optimizer step takes {per_step} ({section}.micro_batch_size="
            f"{train.micro_batch_size} x {made}). {how}, or give more "
            "rows (data.train, data.limit_train)."
        )


def check_terms(returned: Collection[str], weights: Mapping[str, float], counts: Collection[str]) -> None:
    """Refuse loss terms that do not go together by their names.

    Args:
        returned: by the model.
        weights: of the terms of the stage; those of weight 0 may be left out.
        counts: names in the batch.

    Raises:
        TrainingError: with the names of all three.
    """
    needed = {name for name, weight in weights.items() if weight}
    counted = sorted(name for name in counts if name.startswith("count_"))
    if not needed <= {*returned} <= weights.keys() or not {f"count_{name}" for name in returned} <= {*counts}:
        raise TrainingError(
            f"the model returned the loss terms {sorted(returned)} and the batch has {counted}; expected the "
            f"names of `Stage.terms`, {sorted(weights)} (all whose weight is not 0), and a count_<term> of each. Name "
            "them alike in the model, the batch and the stage."
        )


def stop_unless_finite(
    step: int, norm: Tensor | float, losses: Sequence[Tensor], ids: Sequence[Sequence[str]], folder: Path
) -> None:
    """Raise on every process where the gradient norm or a loss of any of them is not a finite number.

    Args:
        step: number of the optimizer step, from 1.
        norm: of the gradient of the global batch; DeepSpeed gives -1 where it is not finite.
        losses: of this process's micro-batches.
        ids: of the rows of each micro-batch.
        folder: where `non_finite.json` goes: `step`, `gradient_norm`, and `process, loss, ids` of every micro-batch.

    Raises:
        TrainingError: names the file and what to try.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    values = torch.stack([torch.as_tensor(norm, device=losses[0].device).float(), *(loss.float() for loss in losses)])
    finite = torch.isfinite(values).all() & (values[0] >= 0)
    if several:
        flag = finite.int()
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        finite = flag.bool()
    if finite:  # the one place where the host waits for the device, once a step
        return
    rank = torch.distributed.get_rank() if several else 0
    batches = [
        {"process": rank, "loss": _readable(loss), "ids": list(rows)}
        for loss, rows in zip(values[1:].tolist(), ids, strict=True)
    ]
    batches = gather_object(batches) if several else batches
    path = folder / NON_FINITE_FILE
    if rank == 0:
        write_json(path, {"step": step, "gradient_norm": _readable(values[0].item()), "batches": batches})
    shown = ", ".join(sorted({str(batch["loss"]) for batch in batches}, key=lambda text: text[:3] != "nan")[:3])
    raise TrainingError(
        f"step {step}: the loss is {shown} and the gradient norm {_readable(values[0].item())}; the ids of the rows of "
        f"that step are in {path}. Look at those rows, lower the learning rate, clip harder (max_grad_norm) or train "
        "in float32; the last checkpoint is intact."
    )


def _readable(value: float) -> float | str:
    # JSON has no NaN; a negative norm is DeepSpeed's way to say so
    return value if math.isfinite(value) and value >= 0 else ("nan" if value < 0 else str(value))


@contextmanager
def said_if_alone(minutes: float) -> Iterator[None]:
    """Say what it means when the processes of a job lose each other, in place of a message of the transport.

    Raises:
        TrainingError: a collective operation timed out, or its connection was closed.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")
        if not any(word in text.lower() for word in lost):
            raise
        raise TrainingError(
            f"another process of this job ended or did not answer for {minutes:g} minutes (launch.timeout_minutes); "
            f"see the messages of the other processes. ({text.splitlines()[0]})"
        ) from error
