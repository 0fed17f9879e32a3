"""vLLM's scheduler with a prefix cache that knows prompts from thoughts.

A cached block is found by its tokens. Those of a thought only stand for what was fed, and the same tokens in a prompt
mean something else. So blocks with tokens of the output are given a name of their request's own: a prompt is shared by
all, and a request that was preempted finds what it had written itself.
"""

from __future__ import annotations

import hashlib
from typing import Any


def scheduler(**arguments: Any) -> Any:
    """Return the scheduler of an engine; vLLM looks this up as if it were a class."""
    if arguments["vllm_config"].scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base

    class LatentScheduler(Base):  # type: ignore[misc, valid-type]
        def add_request(self, request: Any) -> None:
            name_own_blocks(request)
            super().add_request(request)

    return LatentScheduler(**arguments)


def name_own_blocks(request: Any) -> None:
    """Make the blocks that a request fills from now on its own; those of its prompt have been named already."""
    named = request._block_hasher
    if named is not None:
        salt = request.request_id.encode()
        request._block_hasher = lambda it: [hashlib.sha256(name + salt).digest() for name in named(it)]
