"""From a request to its response: prompts, settings, waiting for the engine, the client that goes away."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from latent_sft.data.prompts import CHAT, render_prompt, render_turns
from latent_sft.errors import ConfigError
from latent_sft.inference.noise import Sampling
from latent_sft.inference.show import Reasoner
from latent_sft.method.thinking import Limits
from latent_sft.serve.choice import Choice, Piece
from latent_sft.serve.metrics import Metrics
from latent_sft.serve.protocol import ChatRequest, Refused, Settings
from latent_sft.serve.shapes import Chat, usage
from latent_sft.serve.worker import Job, Worker

GREEDY_BELOW = 1e-3  # temperatures: logits divided by less are beyond what numbers can hold
CLOSED = 499  # the client was gone; only metrics see it
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second is for proxies
THINKS_FREELY = ("latent", "spans")  # thinkers whose number of latents can be set


@dataclass(frozen=True, kw_only=True)
class Service:
    """What all routes need: the model and its name, the engine, seconds that a request may take, the key or None."""

    reasoner: Reasoner
    name: str
    worker: Worker
    timeout: float
    key: str | None
    metrics: Metrics


class Stream(StreamingResponse):
    """A stream that always says when it is over, also where the client was gone before the first piece."""

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=HEADERS)
        self.ended = ended

    async def __call__(self, *args: Any) -> None:
        """See `StreamingResponse`."""
        try:
            await super().__call__(*args)
        finally:
            self.ended()


def check_model(service: Service, name: str | None) -> None:
    """Refuse a name that is not that of the model."""
    if name not in (None, service.name):
        message = f"the model {name!r} is not here; this server has {service.name!r}."
        raise Refused(404, message, param="model", code="model_not_found")


def chat_prompt(reasoner: Reasoner, asked: ChatRequest) -> list[int]:
    """Return the prompt of training for one problem; of a whole conversation where there is a chat template."""
    spec, turns = reasoner.spec, [message.turn() for message in asked.messages]
    if len(turns) > 1 and turns[0] == ("system", spec.system_prompt):
        turns = turns[1:]
    if [role for role, _ in turns] == ["user"]:
        return render_prompt(reasoner.tokenizer, spec, turns[0][1])
    if spec.prompt_template != CHAT:
        message = "messages: this model was trained on single problems; expected one message with the role user."
        raise Refused(400, message, param="messages")
    try:
        return render_turns(reasoner.tokenizer, spec, turns)
    except ConfigError as error:
        raise Refused(400, f"messages: {error}", param="messages") from error


def raw_prompt(reasoner: Reasoner, prompt: str | list[int]) -> list[int]:
    """Return a prompt as it is, control tokens included; only the opening delimiter is added where it is missing."""
    ids, opening = prompt, list(reasoner.spec.think_ids)
    if isinstance(prompt, str):
        tokenizer = reasoner.tokenizer
        ids = tokenizer(prompt)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # which some tokenizers put behind every text
    assert isinstance(ids, list)
    return ids if ids[-len(opening) :] == opening else ids + opening


def _jobs(service: Service, asked: Settings, prompts: list[list[int]]) -> list[Choice]:
    """Return the choices that were asked for, each with its job.

    Raises:
        Refused: a setting or a prompt that this model cannot serve.
    """
    worker, extras, spec = service.worker, asked.latent_sft, service.reasoner.spec
    for prompt in prompts:
        if not 1 <= len(prompt) <= worker.longest:
            message = f"the prompt has {len(prompt)} tokens, expected 1 to {worker.longest}."
            raise Refused(400, message, code="context_length_exceeded")
        if not all(0 <= token < spec.vocab_size for token in prompt):
            raise Refused(400, f"prompt: got token ids beyond 0 to {spec.vocab_size - 1}.", param="prompt")
    usual, kind = worker.limits, service.reasoner.thinker.kind
    least = usual.least if extras.min_latents is None else extras.min_latents
    most = usual.most if extras.max_latents is None else extras.max_latents
    if (extras.min_latents, extras.max_latents) != (None, None) and kind not in THINKS_FREELY:
        raise Refused(
            400, f"latent_sft: the number of latents of this model ({kind}) cannot be set.", param="latent_sft"
        )
    if not least <= most <= usual.most:
        message = f"latent_sft: got {least} to {most} latents, expected min_latents <= max_latents <= {usual.most}."
        raise Refused(400, message, param="latent_sft")
    total = asked.max_completion_tokens
    limits = Limits(least, most, min(usual.answer, asked.max_tokens or usual.answer))
    sampling = None
    if (asked.temperature or 0) >= GREEDY_BELOW:
        seed = secrets.randbits(31) if asked.seed is None else asked.seed % 2**43  # seeds of generators have 64 bits
        top_k = max(asked.top_k or 0, 0)
        sampling = Sampling(temperature=asked.temperature, top_p=asked.top_p or 1.0, top_k=top_k, seed=seed)
    n, changed = asked.n or 1, asyncio.Event()
    watched = bool(asked.stream or asked.stops or total)
    return [
        Choice(
            reasoner=service.reasoner,
            job=Job(
                prompt=prompt,
                changed=changed,
                sampling=sampling,
                place=place,
                limits=limits,
                watched=watched,
                alternatives=asked.alternatives,  # type: ignore[attr-defined]
            ),
            index=i * n + place,
            stops=asked.stops,
            most=total,
            top=extras.top,
            with_latents=extras.latents,
        )
        for i, prompt in enumerate(prompts)
        for place in range(n)
    ]


async def respond(
    request: Request, service: Service, asked: Settings, prompts: list[list[int]], kind: type[Chat]
) -> Response:
    """Return the response to a request.

    Args:
        request: as it came; its body was read.
        service: what is served.
        asked: its body.
        prompts: token ids.
        kind: how the response looks.

    Raises:
        Refused: it cannot be served, or not now.
    """
    check_model(service, asked.model)
    started, worker, path = time.monotonic(), service.worker, request.url.path
    choices = _jobs(service, asked, prompts)
    jobs = [choice.job for choice in choices]
    if len(jobs) > worker.capacity:
        raise Refused(400, f"n: got {len(jobs)} choices, expected at most {worker.capacity}.", param="n")
    if not worker.alive():
        raise Refused(503, "the engine has ended.")
    if not worker.submit(jobs):
        raise Refused(429, "too many requests are waiting; try again later.", code="queue_full")
    shape = kind(service.name, service.reasoner, asked.alternatives is not None)  # type: ignore[attr-defined]
    status, length = CLOSED, sum(map(len, prompts))

    def ended() -> None:
        worker.release(jobs)
        service.metrics.request(path, status)
        service.metrics.ended(choices, started)

    async def pieces() -> AsyncIterator[tuple[Choice, Piece]]:
        unfinished = choices
        try:
            while unfinished:
                async with asyncio.timeout(service.timeout - (time.monotonic() - started)):
                    await jobs[0].changed.wait()
                jobs[0].changed.clear()
                for choice in unfinished:
                    if choice.job.error is not None:
                        raise Refused(500, "decoding failed; see the log of the server.")
                    if choice.job.seen is not choice.taken:
                        yield choice, choice.update()
                worker.release([choice.job for choice in unfinished if choice.finish_reason])
                unfinished = [choice for choice in unfinished if not choice.finish_reason]
        except TimeoutError:
            message = f"the answer was not there within {service.timeout:g} s."
            raise Refused(504, message, code="timeout") from None

    async def events() -> AsyncIterator[str]:
        nonlocal status
        try:
            for choice in choices:
                for part in shape.first(choice):
                    yield _event(part)
            async for choice, piece in pieces():
                if piece.text == choice.text != "":
                    service.metrics.began(started)
                for part in shape.parts(choice, piece):
                    yield _event(part)
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(shape.event([], usage=usage(length, choices)))
            status = 200
        except Refused as error:
            status = error.status
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    if asked.stream:
        return Stream(events(), ended)
    gone = asyncio.create_task(_gone(request))
    work = asyncio.create_task(_collect(pieces()))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLOSED)
        work.result()
        status = 200
        return JSONResponse(shape.whole(length, choices))
    except Refused as error:
        status = error.status
        return JSONResponse(error.body(), status)
    finally:
        gone.cancel()
        work.cancel()
        ended()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _collect(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
