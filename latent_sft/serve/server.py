"""Routes: what OpenAI's clients expect of a server, answered by the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from latent_sft.errors import ConfigError
from latent_sft.inference.show import Reasoner
from latent_sft.serve.answer import Service, chat_prompt, check_model, raw_prompt, respond
from latent_sft.serve.metrics import Metrics
from latent_sft.serve.protocol import ChatRequest, CompletionRequest, Refused, read
from latent_sft.serve.shapes import Chat, Completion
from latent_sft.serve.worker import Worker

PAGE = Path(__file__).parent / "templates" / "index.html"
API_KEY = "LATENT_SFT_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")
MOST_BYTES = 2**20  # of the body of a request
DRAIN_SECONDS = 25  # what is in work when the server is told to stop has so long; supervisors kill after 30
logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # connections inherit it; asyncio sets it for sockets of its own only, and without it an answer waits 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(
            f"serve: cannot listen at {host}:{port} ({reason}); choose another --host or --port."
        ) from error
    return listener


def serve(
    reasoner: Reasoner,
    *,
    name: str,
    host: str,
    port: int,
    batch_size: int,
    most_waiting: int,
    longest: int | None,
    timeout: float,
    key: str | None,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT, which are raised again once what runs is finished, or after DRAIN_SECONDS.

    Args:
        reasoner: the model.
        name: by which clients know it.
        host: address to listen at.
        port: 0 picks a free one.
        batch_size: choices that are decoded together at most.
        most_waiting: choices that may wait for a place among these.
        longest: most tokens of a prompt; what the model's positions leave by default.
        timeout: seconds that a request may take.
        key: that clients must send; None lets everybody in.
        ready: called with the address.

    Raises:
        ConfigError: nobody can listen there, or no room for such prompts.
    """
    worker = Worker(reasoner, longest=longest, batch_size=batch_size, most_waiting=most_waiting)
    service = Service(reasoner=reasoner, name=name, worker=worker, timeout=timeout, key=key, metrics=Metrics(worker))
    if key is None and host not in LOCAL:
        logger.warning("serve: whoever reaches %s can use this server; set %s, or --api-key-file", host, API_KEY)
    listener = listen(host, port)
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


def read_key(path: Path | None) -> str | None:
    """Return the API key of a file, or of the environment.

    Raises:
        ConfigError: the file is empty.
    """
    if path is None:
        return os.environ.get(API_KEY, "").strip() or None
    if not (key := path.read_text(encoding="utf-8").strip()):
        raise ConfigError(f"--api-key-file: {path} is empty; expected the key as its only line.")
    return key


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

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, Refused(500, "the server failed; see its log."))

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
        check_model(service, name)
        return card

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read(ChatRequest, await _body(request, service))
        prompts = [chat_prompt(service.reasoner, asked)]
        return await respond(request, service, asked, prompts, Chat)

    @guarded.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = read(CompletionRequest, await _body(request, service))
        prompts = [raw_prompt(service.reasoner, prompt) for prompt in asked.prompts]
        return await respond(request, service, asked, prompts, Completion)

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
