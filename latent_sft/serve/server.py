"""Routes: what OpenAI's clients expect of a server, answered by the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from latent_sft.data.prompts import CHAT, render_prompt, render_turns
from latent_sft.errors import ConfigError
from latent_sft.inference.noise import Sampling
from latent_sft.inference.show import Reasoner
from latent_sft.method.thinking import Limits
from latent_sft.serve.choice import Choice, Piece
from latent_sft.serve.metrics import Metrics
from latent_sft.serve.protocol import ChatRequest, CompletionRequest, Refused, Settings, read
from latent_sft.serve.shapes import Chat, Completion, usage
from latent_sft.serve.worker import Job, Worker

PAGE = Path(__file__).parent / "templates" / "index.html"
MOST_BYTES = 2**20  # of the body of a request
DRAIN_SECONDS = 25  # what is in work when the server is told to stop has so long; supervisors kill after 30
CLOSED = 499  # the client was gone; only metrics see it
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
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.ended = ended

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.ended()


def serve(service: Service, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, which are raised again once what runs is finished, or after DRAIN_SECONDS.

    Args:
        service: what is served.
        host: address to listen at.
        port: 0 picks a free one.
        ready: called with the address.

    Raises:
        ConfigError: nobody can listen there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"serve: cannot listen at {host}:{port} ({reason}); choose another --host or --port."
        ) from error
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}")
    with listener:
        server.run(sockets=[listener])


def create_app(service: Service) -> FastAPI:
    """Return the application; its engine runs from start-up to shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    page, created = PAGE.read_text(encoding="utf-8"), int(time.time())
    card = {"id": service.name, "object": "model", "created": created, "owned_by": "latent_sft"}
    card |= {"max_prompt_tokens": service.worker.longest, "thinker": service.reasoner.thinker.kind}

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if service.key is not None and not hmac.compare_digest(given, service.key.encode()):
            raise Refused(
                401, "wrong or missing API key; send it as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )

    guarded = APIRouter(dependencies=[Depends(authorised)])

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        service.metrics.request(request.url.path, error.status)
        headers = {"Retry-After": "1"} if error.status == 429 else {"WWW-Authenticate": "Bearer"}
        return JSONResponse(error.body(), error.status, headers if error.status in (401, 429) else None)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(Refused(error.status_code, message).body(), error.status_code, error.headers)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.alive()
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @guarded.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @guarded.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return card

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read(ChatRequest, await _body(request, service))
        prompts = [_chat_prompt(service.reasoner, asked)]
        return await _respond(request, service, asked, prompts, Chat)

    @guarded.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = read(CompletionRequest, await _body(request, service))
        prompts = [_raw_prompt(service.reasoner, prompt) for prompt in asked.prompts]
        return await _respond(request, service, asked, prompts, Completion)

    app.include_router(guarded)
    return app


async def _body(request: Request, service: Service) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "expected a body of type application/json.")  # which no page of another site can send
    too_large = Refused(413, f"the body is larger than {MOST_BYTES} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(service.timeout):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {service.timeout:g} s.") from None
    return bytes(body)


def _check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name):
        message = f"the model {name!r} is not here; this server has {service.name!r}."
        raise Refused(404, message, param="model", code="model_not_found")


def _chat_prompt(reasoner: Reasoner, asked: ChatRequest) -> list[int]:
    """Return the prompt of training for one problem; of a whole conversation where there is a chat template."""
    spec, turns = reasoner.spec, [message.turn() for message in asked.messages]
    if len(turns) > 1 and turns[0] == {"role": "system", "content": spec.system_prompt}:
        turns = turns[1:]
    if [turn["role"] for turn in turns] == ["user"]:
        return render_prompt(reasoner.tokenizer, spec, turns[0]["content"])
    if spec.prompt_template != CHAT:
        message = "messages: this model was trained on single problems; expected one message with the role user."
        raise Refused(400, message, param="messages")
    try:
        return render_turns(reasoner.tokenizer, spec, turns)
    except ConfigError as error:
        raise Refused(400, f"messages: {error}", param="messages") from error


def _raw_prompt(reasoner: Reasoner, prompt: str | list[int]) -> list[int]:
    """Return a prompt as it is, control tokens included; only the opening delimiter is added where it is missing."""
    ids, opening = prompt, list(reasoner.spec.think_ids)
    if isinstance(prompt, str):
        ids = reasoner.tokenizer(prompt)["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == reasoner.tokenizer.eos_token_id and not prompt.endswith("</s>") else ids
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
    if asked.temperature:
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


async def _respond(
    request: Request, service: Service, asked: Settings, prompts: list[list[int]], kind: type[Chat]
) -> Response:
    _check_model(service, asked.model)
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
