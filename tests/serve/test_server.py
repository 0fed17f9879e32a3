"""What the server refuses, whom it stops working for, and how it ends; over plain HTTP where clients would not."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serve.running import TOKENIZER, Gate, Running, reasoner_of, running

from latent_sft import cli
from latent_sft.method.types import SPEC_FILE
from latent_sft.models.load import save_lm
from latent_sft.serve.server import MOST_BYTES, listen

CHAT, RAW = "/v1/chat/completions", "/v1/completions"
ASKED = {"messages": [{"role": "user", "content": "2 + 3"}]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(reasoner_of("latent")) as server:
        yield server


def send(server: Running, method: str, path: str, body: object = None, headers: dict[str, str] | None = None):
    """Return status, headers and body, which is JSON where it says so."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, path, body, JSON if headers is None else headers)
        response = connection.getresponse()
        text = response.read()
        kind = response.headers.get("content-type", "")
        return response.status, response.headers, json.loads(text) if kind == "application/json" else text.decode()


def until(what) -> None:
    """Wait for something that another thread is about to do."""
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "valid array"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, "text"),
        ({"messages": [*ASKED["messages"], *ASKED["messages"]]}, "messages", "trained on single problems"),
        (
            {"messages": [{"role": "user", "content": "1 " * 2000}]},
            None,
            "the prompt has 2003 tokens, expected 1 to 1010.",
        ),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100}, "n", "got 100 choices, expected at most 68"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 0.5}, None, "frequency_penalty is not available here; leave it out"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"tools": [{"type": "function"}]}, None, "tools is not available here"),
        ({"temprature": 1}, "temprature", "Extra inputs are not permitted"),
        (
            {"latent_sft": {"max_latents": 7}},
            "latent_sft",
            "got 0 to 7 latents, expected min_latents <= max_latents <= 6",
        ),
        ({"latent_sft": {"min_latents": 3, "max_latents": 2}}, "latent_sft", "got 3 to 2 latents"),
        ({"latent_sft": {"bottom": 1}}, "latent_sft.bottom", "Extra inputs are not permitted"),
    ],
)
def test_wrong_requests_say_what_is_wrong(server: Running, change: dict, param: str | None, message: str) -> None:
    status, _, body = send(server, "POST", CHAT, ASKED | change)
    error = body["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"] and (param is None or error["param"] == param)


def test_settings_that_ask_for_nothing_are_taken(server: Running) -> None:
    neutral = {"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "user": "me", "top_p": None}
    plain, other = (send(server, "POST", CHAT, ASKED | change) for change in ({}, neutral | {"latent_sft": None}))
    parts = {
        "messages": [
            {"role": "system", "content": "1 +"},
            {"role": "user", "content": [{"type": "text", "text": "2 + 3"}]},
        ]
    }
    third = send(server, "POST", CHAT, parts)  # the instruction of training may be repeated
    assert (plain[0], other[0], third[0]) == (200, 200, 200)
    assert plain[2]["choices"] == other[2]["choices"] == third[2]["choices"]


def test_bodies_that_are_no_request(server: Running) -> None:
    def error(*request: object) -> tuple[int, str]:
        status, _, body = send(server, "POST", *request)
        return status, body["error"]["message"]

    assert error(CHAT, "{") == (400, "Invalid JSON: EOF while parsing an object at line 1 column 1.")
    assert error(CHAT, "[]")[0] == error(CHAT, b"\xff")[0] == error(CHAT, "")[0] == 400
    assert error(CHAT, json.dumps(ASKED), {"Content-Type": "text/plain"})[0] == 415
    assert error(RAW, {"prompt": [1, 99]})[1].startswith("prompt: got token ids beyond 0 to")
    assert error(RAW, {"prompt": []})[0] == error(RAW, {"prompt": [None]})[0] == error(RAW, {"prompt": 3})[0] == 400
    too_large = (413, f"the body is larger than {MOST_BYTES} bytes.")
    assert error(CHAT, "x" * 10, JSON | {"Content-Length": str(MOST_BYTES + 1)}) == too_large
    chunks = (b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16) for _ in range(17))
    status = send(server, "POST", CHAT, chunks, JSON | {"Transfer-Encoding": "chunked"})[0]
    assert status == 413
    assert send(server, "POST", CHAT, ASKED)[0] == 200


def test_other_routes(server: Running) -> None:
    assert send(server, "GET", "/health")[::2] == (200, {"status": "ok"})
    (card,) = send(server, "GET", "/v1/models")[2]["data"]
    assert (card["id"], card["thinker"]) == ("tiny", "latent")
    assert send(server, "GET", "/v1/models/tiny")[2] == card
    status, _, body = send(server, "GET", "/v1/models/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here; this server has 'tiny'"):
        server.client().chat.completions.create(model="gpt", messages=ASKED["messages"])
    for method, path, expected in (("GET", CHAT, 405), ("POST", "/v1/embeddings", 404), ("GET", "/docs", 404)):
        status, _, body = send(server, method, path)
        assert status == expected and body["error"]["message"].startswith(f"{method} {path}: ")


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    status, headers, page = send(server, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"https?://|//[a-z]|\bimport\b|innerHTML", page)
    assert {"/v1/models", CHAT} == set(re.findall(r'"(/v1/[^"]+)"', page))


def test_a_key_is_needed_where_there_is_one() -> None:
    with running(reasoner_of("none"), key="s3cret") as server:
        assert server.client("s3cret").chat.completions.create(model="tiny", messages=ASKED["messages"]).choices
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key") as caught:
            server.client("wrong").models.list()
        assert "s3cret" not in str(caught.value)
        for path in ("/v1/models", "/metrics"):
            for given in (
                {},
                {"Authorization": "Bearer s3cre"},
                {"Authorization": "Bearer s3cret2"},
                {"Authorization": "Bearer é"},
            ):
                assert send(server, "GET", path, headers=given)[0] == 401
        assert send(server, "GET", "/health")[0] == send(server, "GET", "/")[0] == 200


def test_a_full_queue_is_said_and_free_again() -> None:
    reasoner = reasoner_of("none")
    gate = Gate(reasoner.thinker.lm)
    with running(reasoner, batch_size=2, most_waiting=1) as server, ThreadPoolExecutor(3) as pool:
        others = [pool.submit(send, server, "POST", CHAT, ASKED) for _ in range(3)]
        until(lambda: len(server.worker.open) == 3)
        status, headers, body = send(server, "POST", CHAT, ASKED)
        assert (status, body["error"]["type"], headers["retry-after"]) == (429, "rate_limit_error", "1")
        assert "latent_sft_waiting" in send(server, "GET", "/metrics")[2]
        gate.open.set()
        assert [other.result()[0] for other in others] == [200] * 3
        assert send(server, "POST", CHAT, ASKED)[0] == 200
        metrics = dict(re.findall(r"^(\S+) (\S+)$", send(server, "GET", "/metrics")[2], re.M))
    counted = {
        status: metrics[f'latent_sft_requests_total{{route="{CHAT}",status="{status}"}}'] for status in (200, 429)
    }
    assert counted == {200: "4.0", 429: "1.0"}
    assert metrics["latent_sft_prompt_tokens_total"] == "24.0"
    assert metrics["latent_sft_request_seconds_count"] == "4.0" and metrics["latent_sft_waiting"] == "0.0"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_who_has_gone_is_not_worked_for(stream: bool, waits: bool) -> None:
    reasoner = reasoner_of("none", endless=True, max_answer_tokens=900)
    gate = Gate(reasoner.thinker.lm)
    with running(reasoner, batch_size=1) as server:

        def leave() -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                body = json.dumps(ASKED | {"stream": stream})
                head = (
                    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                )
                client.sendall(f"{head}\r\n\r\n{body}".encode())
                until(lambda: len(server.worker.open) == 1 + waits)

        with ThreadPoolExecutor(1) as pool:
            if waits:
                first = pool.submit(send, server, "POST", CHAT, ASKED)
                until(lambda: len(server.worker.open) == 1)
            leave()
            until(lambda: len(server.worker.open) == waits)
            gate.open.set()
            assert not waits or first.result()[0] == 200
        assert send(server, "POST", CHAT, ASKED | {"max_tokens": 2})[0] == 200
        # its slot was freed long before the 900 tokens that it could have had
        text = send(server, "GET", "/metrics")[2]
    assert 'status="499"} 1.0' in text
    if not waits:
        assert float(re.search(r"^latent_sft_answer_tokens_total (\S+)", text, re.M)[1]) < 100


def test_what_is_written_is_sent_at_once() -> None:
    """Small packets that wait for an acknowledgement cost 40 ms per answer."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_time_is_up_for_waiting_and_for_streams() -> None:
    reasoner = reasoner_of("none")
    gate = Gate(reasoner.thinker.lm)
    with running(reasoner, batch_size=1, timeout=0.2) as server:
        status, _, body = send(server, "POST", CHAT, ASKED)
        assert (status, body["error"]["code"]) == (504, "timeout")
        text = send(server, "POST", CHAT, ASKED | {"stream": True})[2]
        *_, error, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert (json.loads(error)["error"]["code"], end) == ("timeout", "[DONE]")
        until(lambda: not server.worker.open)
        gate.open.set()


def test_a_step_that_fails_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    reasoner, broken = reasoner_of("latent"), [True]

    def fail(*given: object) -> None:
        if broken:
            raise RuntimeError("out of memory")

    reasoner.thinker.lm.register_forward_pre_hook(fail)
    with running(reasoner) as server:
        with pytest.raises(openai.InternalServerError, match="decoding failed; see the log of the server"):
            server.client().chat.completions.create(model="tiny", messages=ASKED["messages"])
        assert "out of memory" in caplog.text
        broken.clear()
        assert send(server, "POST", CHAT, ASKED)[0] == 200
        until(lambda: not server.worker.open)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that writes 300 tokens for every problem."""
    folder = tmp_path_factory.mktemp("checkpoint") / "endless"
    reasoner = reasoner_of("latent", endless=True, max_answer_tokens=300)
    save_lm(reasoner.thinker.lm.float(), folder, TOKENIZER)
    (folder / SPEC_FILE).write_text(json.dumps(reasoner.spec.to_dict()))
    return folder


def test_sigterm_finishes_what_runs(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "latent_sft.cli", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = re.search(r"serving endless at http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{address[1]}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="endless", messages=ASKED["messages"], stream=True)
        text = next(chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content)
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert len(text.split()) == 300 and chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0
        errors = process.stderr.read()
        assert "Traceback" not in errors and "error" not in errors.lower()


def test_mistakes_on_the_command_line(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def message(*options: str) -> str:
        assert cli.main(["serve", str(checkpoint), *options]) == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "(Address already in use); choose another --host or --port." in message(
            "--port", str(taken.getsockname()[1])
        )
    assert "--max-length: got 2000, expected 1 to 717; the rest of the model's 1024 positions" in message(
        "--max-length", "2000"
    )
    (tmp_path / "key").touch()
    assert "key is empty; expected the key as its only line" in message("--api-key-file", str(tmp_path / "key"))
    monkeypatch.delitem(sys.modules, "latent_sft.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve: needs uvicorn; run pip install 'latent_sft[serve]'." in message()
