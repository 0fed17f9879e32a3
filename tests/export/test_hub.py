"""Uploading, against a local server that speaks the Hub's HTTP API: bytes, secrecy of the token, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from latent_sft import cli
from latent_sft.errors import ExportError
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.export.hub import push
from latent_sft.inference.generate import Decoded, generate
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.models.thoughts import load_thoughts


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
