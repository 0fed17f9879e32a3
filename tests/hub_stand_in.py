"""A local server that speaks the Hub's HTTP API, as far as uploads and downloads go."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
            plan = [(f["path"], mode[f["path"].endswith((".safetensors", ".pt"))]) for f in files]
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
                elif line["key"] == "deletedFile":
                    del committed[value["path"]]
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
        if match := re.fullmatch(r"/(.+)/resolve/\w+/(.+)", path):
            found = self.files.get((match[1], "main"), {}).get(match[2])
            return (404, {}) if found is None else (200, found)
        if match := re.fullmatch(r"/api/models/(.+)/tree/.+", path):
            files = self.files.get((match[1], "main"), {}).items()
            return 200, [{"type": "file", "path": p, "size": len(data), "oid": COMMIT} for p, data in files]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            files = self.files.get((match[1], "main"), {})
            return 200, {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return 404, {"error": f"no such address: {path}"}


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the stand-in in a thread of its own."""
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
