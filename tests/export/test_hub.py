"""Uploading, against a local server that speaks the Hub's HTTP API: bytes, secrecy of the token, and clear refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from latent_sft import cli
from latent_sft.errors import ExportError
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.export.hub import push
from latent_sft.inference.generate import Decoded, generate
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.models.thoughts import load_thoughts

TOKEN = "hf_secretsecretsecretsecret"
COMMIT = "0" * 40


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    """A stand-in for the Hub: the endpoints that uploads and downloads use, everything kept in memory.

    Attributes:
        refuse: status of every answer about repositories; 0 accepts the right token.
        requests: all that arrived.
        repos: name -> whether it is private.
        branches: made besides main.
        objects: LFS objects by SHA-256.
        files: (repository, branch) -> path -> bytes, as committed.
    """

    refuse: int = 0
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    repos: dict[str, bool] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)

    def answer(self, request: Request) -> tuple[int, Any]:
        """Return status and JSON, or a file's bytes, for a request."""
        path, body = request.path, request.body
        if path.startswith("/storage/"):  # a signed address of another server on the real Hub
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if self.refuse:
            return self.refuse, {"error": "refused"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, wanted.get("visibility") == "private")
            return status, {"url": f"{self.url}/{name}"}
        if match := re.fullmatch(r"/api/models/(.+)/branch/(\w+)", path):
            self.branches.append(match[2])
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(\w+)", path):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            plan = [(f["path"], mode[f["path"].endswith(".safetensors")]) for f in files]
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in plan]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.url}/storage/{entry['oid']}"},
                    "verify": {"href": f"{self.url}/verify"},
                }
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/verify":
            return (200 if json.loads(body)["oid"] in self.objects else 404), {}
        if match := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", path):
            committed = self.files.setdefault((match[1], match[2]), {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    committed[value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
        if match := re.fullmatch(r"/(.+)/resolve/\w+/(.+)", path):
            found = self.files[(match[1], "main")].get(match[2])
            return (404, {}) if found is None else (200, found)
        if match := re.fullmatch(r"/api/models/(.+)/tree/.+", path):
            files = self.files[(match[1], "main")].items()
            return 200, [{"type": "file", "path": p, "size": len(data), "oid": COMMIT} for p, data in files]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return 200, {"id": match[1], "sha": COMMIT, "siblings": []}
        return 404, {"error": f"no such address: {path}"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.read_chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path.partition("?")[0], headers, body)
            state.requests.append(request)
            status, answer = state.answer(request)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", hashlib.sha256(data).hexdigest())
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def read_chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            chunk = self.rfile.read(size)
            self.rfile.readline()
            return chunk

        def log_message(self, *_: object) -> None:
            """Keep the test output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process at the stand-in; huggingface_hub read its environment when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet is a protocol and a server of its own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("hub") / "export")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("client")
def test_the_command_uploads_every_byte_and_shows_the_token_to_nobody(
    checkpoint: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    out = tmp_path / "out"
    command = ["export", str(checkpoint), "--out", str(out), "--push-to-hub", "me/model", "--private", "--debug"]
    assert cli.main(command) == 0
    shown = capfd.readouterr()
    assert shown.out.splitlines() == [str(out), f"{hub.url}/me/model"]
    assert TOKEN not in shown.out + shown.err + caplog.text
    assert hub.files[("me/model", "main")] == contents(out)
    assert hub.repos == {"me/model": True}
    assert len(hub.objects) == 1  # the weights went the way of large files
    for request in hub.requests:
        rest = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in request.path + str(rest)
        assert TOKEN.encode() not in request.body
        if request.path.startswith("/storage/"):
            assert "authorization" not in request.headers


FROM_THE_HUB = """
import json, sys
sys.modules["latent_sft"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

ids = torch.tensor(json.loads(sys.argv[1]))
trusting = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True)
plain = LlamaForCausalLM.from_pretrained("me/model")
output = plain.generate(ids, custom_generate="me/model", trust_remote_code=True)
print(json.dumps([trusting.generate(ids).tolist(), output.tolist()]))
"""


def run_from_the_hub(hub: Hub, prompt: list[int], tmp_path: Path) -> list[list[list[int]]]:
    """Return what FROM_THE_HUB prints, in a process of its own with an empty cache."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", FROM_THE_HUB, json.dumps([prompt])],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def sequence_of(prompt: list[int], row: Decoded, spec: LatentSpec) -> list[int]:
    return [*prompt, *spec.end_think_ids, *row.answer_ids, *([spec.eos_id] if row.finished else [])]


@pytest.mark.usefixtures("client")
def test_an_uploaded_repository_runs_from_its_name(hub: Hub, folder: Path, spec: LatentSpec, tmp_path: Path) -> None:
    push(folder, "me/model")
    prompt = [7, 5, *spec.think_ids]
    found = run_from_the_hub(hub, prompt, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    row = generate(model, spec, [prompt], thinker="latent")[0]
    assert found == [[sequence_of(prompt, row, spec)]] * 2


@pytest.mark.usefixtures("client")
def test_thoughts_in_hidden_states_come_from_the_hub_too(
    hub: Hub, thinking: dict[str, Path], spec: LatentSpec, tmp_path: Path
) -> None:
    folder = export_checkpoint(thinking["kava"], tmp_path / "export")
    push(folder, "me/model")
    prompt = [7, 5, *spec.think_ids]
    found = run_from_the_hub(hub, prompt, tmp_path)
    how = ThoughtSpec(num_latents=5, iterations=2, projection=True)
    thoughts = load_thoughts(folder / "thoughts.safetensors", how, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    row = generate(model, spec, [prompt], thinker="continuous", thoughts=thoughts)[0]
    assert found == [[sequence_of(prompt, row, spec)]] * 2


@pytest.mark.usefixtures("client")
def test_pushing_again_and_to_a_branch(hub: Hub, folder: Path) -> None:
    hub.repos["me/model"] = True
    assert push(folder, "me/model", revision="v2") == f"{hub.url}/me/model"
    assert hub.branches == ["v2"]
    assert list(hub.files) == [("me/model", "v2")]
    assert hub.files[("me/model", "v2")] == contents(folder)
    assert hub.repos == {"me/model": True}


@pytest.mark.usefixtures("client")
def test_a_name_without_owner_is_one_s_own(hub: Hub, folder: Path) -> None:
    assert push(folder, "model") == f"{hub.url}/me/model"
    assert list(hub.files) == [("me/model", "main")]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"me/model: .* does not accept the token \(401\).*`hf auth login`"),
        (403, r"me/model: the token may not write there \(403\): a read-only token.* write access"),
        (404, r"me/model: .* does not know this repository or branch \(404\)"),
        (500, r"me/model: .* answered 500 \(refused\); try again later"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, folder: Path, status: int, message: str) -> None:
    hub.refuse = status
    with pytest.raises(ExportError, match=message) as caught:
        push(folder, "me/model")
    assert TOKEN not in str(caught.value)
    assert not hub.files


@pytest.mark.usefixtures("client")
def test_a_wrong_token_is_refused_by_the_server(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match=r"does not accept the token \(401\)") as caught:
        push(folder, "me/model")
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.usefixtures("client")
def test_without_a_token_nothing_is_sent(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        ExportError, match=r"no Hugging Face token found\. Log in with `hf auth login`, or set HF_TOKEN"
    ):
        push(folder, "me/model")
    assert not hub.requests


@pytest.mark.usefixtures("client")
def test_no_network_is_told_from_offline_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    with pytest.raises(ExportError, match=r"cannot reach http://127\.0\.0\.1:9 \(ConnectError\).* can be pushed later"):
        push(folder, "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"offline mode is on \(HF_HUB_OFFLINE\); unset it to upload"):
        push(folder, "me/model")


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("name", ["a/b/c", "me/my model", "me/a--b", ""])
def test_a_bad_name_is_refused_before_anything_is_sent(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(ExportError, match=r"not a repository name .* Expected user/name"):
        push(folder, name)
    assert not hub.requests


@pytest.mark.usefixtures("client")
def test_only_exports_are_uploaded(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=r"final: not an exported folder; write one with `latent-sft export`"):
        push(checkpoint, "me/model")
    assert not hub.requests
