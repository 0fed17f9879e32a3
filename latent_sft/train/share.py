"""Validation shared out among the processes of a job: each decodes some of the rows, and all get every result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from latent_sft.data.collate import TokenRow
from latent_sft.experiment.workspace import processes
from latent_sft.inference.generate import Decoded
from latent_sft.inference.slots import PREFILL_TOKENS
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec
from latent_sft.models.sharding import is_partitioned


def solve_share(
    thinker: Thinker,
    spec: LatentSpec,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    max_cot_tokens: int,
) -> dict[int, Decoded]:
    """Decode this process's rows, greedily; see `inference.solve.solve`.

    Where ZeRO-3 has shared the parameters out, calls of a module are collectives. The processes then decode equally
    many, in batches whose prompts are read at once, and go on until the longest row of all of them has ended.

    Returns:
        Index of a row -> what it produced.
    """
    job = processes()
    own = list(range(job.process_index, len(rows), job.num_processes))
    options: dict[str, Any] = {"max_cot_tokens": max_cot_tokens}
    at_once = max(1, len(own))
    if job.num_processes > 1 and is_partitioned(thinker.lm.parameters()):
        own += [0] * (-(-len(rows) // job.num_processes) - len(own))
        longest = max(row["length"] for row in rows)
        longest += 0 if thinker.thoughts is None else thinker.thoughts.spec.num_latents
        batch_size = at_once = min(batch_size, max(1, PREFILL_TOKENS // longest))
        options["together"] = _any
    found: dict[int, Decoded] = {}
    for first in range(0, len(own), at_once):
        some = own[first : first + at_once]
        decoded = solve(thinker, spec, [rows[i] for i in some], batch_size=batch_size, **options)
        found |= zip(some, decoded, strict=True)
    return {i: decoded for i, decoded in found.items() if i % job.num_processes == job.process_index}


def gathered(found: dict[int, Any]) -> list[Any]:
    """Return what the processes found, in the order of the rows."""
    pairs = list(found.items())
    if processes().num_processes > 1:
        pairs = gather_object(pairs)
    return [result for _, result in sorted(dict(pairs).items())]


def _any(busy: bool) -> bool:
    flag = torch.tensor(int(busy), device=processes().device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return flag.item() > 0
