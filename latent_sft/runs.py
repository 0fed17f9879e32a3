"""Run directories: what is in them, what is finished, and whether two artefacts fit together.

    <run>/config.yaml                 the resolved configuration
    <run>/data/  labels/  eval/  report/  export/  logs/
    <run>/<stage>/manifest.json       status, fingerprint, inputs, versions, git revision, seed, metrics, seconds
    <run>/<stage>/{tensorboard,checkpoint-*,final}

A step (a stage, the labels, an evaluation) is finished when its manifest says so and its fingerprint is the one the
configuration asks for now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from latent_sft.errors import ArtefactError

MANIFEST = "manifest.json"
LOCK, CLAIM = ".lock", ".claim"
RUNNING, FINISHED = "running", "finished"
# how long a stage trains: with another value it goes on from where it is
_LENGTH = ("train.max_steps ", "train.epochs ", "train.stop_at_accuracy ")


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits of the canonical JSON of `parts` (dataclasses become dictionaries)."""
    plain = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part; a full disk keeps the old.

    Raises:
        ArtefactError: the file could not be written (full disk, no permission).
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        why = error.strerror or error
        raise ArtefactError(f"{path}: could not be written ({why}); the previous file is untouched.") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtefactError: missing or damaged file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing.") from error
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: damaged JSON ({error}); delete it to make it again.") from error


@contextlib.contextmanager
def exclusive(folder: Path, file: str = LOCK, *, take: bool = True, wait: float = 10.0) -> Iterator[None]:
    """Hold a folder against other jobs that would write into it; the hold ends with this process, however it ends.

    Args:
        folder: of a step; made if missing.
        file: LOCK, who writes, or CLAIM, who is to make the step: that one may let another process write.
        take: whether this process does it (rank 0), or only passes through.
        wait: seconds for the other one to end; a job that was just killed needs a moment to be gone.

    Raises:
        ArtefactError: another process holds the folder.
    """
    if not take:
        yield
        return
    while (handle := lock(folder / file)) is None:
        if wait <= 0:
            holder = (folder / file).read_text(encoding="utf-8") or "unknown"
            raise ArtefactError(
                f"{folder}: another job is writing here ({holder}). Wait for it, end it, or use another run_dir."
            )
        time.sleep(0.2)
        wait -= 0.2
    with handle:
        yield


def lock(path: Path) -> IO[str] | None:
    """Lock a file, made if missing, until the handle is closed or this process ends; None where another one has it.

    A file system without locks gives it to everybody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held by the caller)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError:
        pass
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def environment() -> dict[str, Any]:
    """Return versions and the git revision, as recorded in every manifest and printed by `latent-sft env`."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {"python": sys.version.split()[0]}
    for name in ("latent_sft", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "omegaconf"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "git": _git_revision()}


def _git_revision() -> dict[str, Any]:
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        revision = git("rev-parse", "HEAD")
        return {
            "revision": revision or "unknown",
            "dirty": bool(revision and git("status", "--porcelain", "--", str(here))),
        }
    except (OSError, subprocess.TimeoutExpired):
        return {"revision": "unknown", "dirty": False}


def outcome_of(manifest: Mapping[str, Any]) -> str | None:
    """Return `Step.outcome` of a step from its manifest."""
    history = manifest.get("history")
    return fingerprint(manifest["inputs"], history) if history else manifest.get("fingerprint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One resumable step of a run: its folder and what it was made from.

    Attributes:
        directory: folder of the step.
        inputs: everything that decides its result (settings, fingerprints of earlier artefacts), JSON-able; empty where
            only the folder is known.
    """

    directory: Path
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the inputs."""
        return fingerprint(self.inputs)

    @property
    def outcome(self) -> str:
        """Fingerprint for what is made from this step: of its inputs, and of how training departed from them."""
        history = (self.manifest() or {}).get("history")
        return fingerprint(self.inputs, history) if history else self.fingerprint

    @property
    def final(self) -> Path:
        """Folder of what the step made."""
        return self.directory / "final"

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None where the step never began.

        Raises:
            ArtefactError: it is damaged.
        """
        path = self.directory / MANIFEST
        if not path.exists():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or not found.keys() >= {"status", "fingerprint", "inputs"}:
            raise ArtefactError(f"{path}: not the manifest of a step; delete {self.directory} to make that step again.")
        return found

    def is_finished(self) -> bool:
        """Return whether the step is done with exactly these inputs; one that is to train longer now is not.

        Raises:
            ArtefactError: the folder holds the same step made from other inputs; the message names them.
        """
        found = self.manifest()
        if found is None:
            return False
        if found["fingerprint"] != self.fingerprint:
            changed = self.changes(found)
            if changed and all(line.startswith(_LENGTH) for line in changed):
                return False
            raise ArtefactError(
                f"{self.directory}: made by another experiment ({'; '.join(changed[:4]) or 'inputs differ'}). "
                "Nothing was overwritten. Use another run_dir, restore the settings, or delete that folder."
            )
        return found["status"] == FINISHED

    def changes(self, manifest: dict[str, Any]) -> list[str]:
        """Return which inputs differ from those of a manifest, and how."""
        return _differences(manifest["inputs"], json.loads(json.dumps(self.inputs, default=str)))

    def begin(self, seed: int, history: Sequence[dict[str, Any]] = ()) -> None:
        """Record that the step is running; call after `is_finished` returned False.

        Args:
            seed: of the experiment.
            history: where training departed from its plan so far: `step`, `of` how many, `fingerprint` until then.
        """
        self.manifest()  # a damaged one is an error, not something to write over
        started = {"status": RUNNING, "fingerprint": self.fingerprint, "inputs": self.inputs, "seed": seed}
        if history:
            started["history"] = list(history)
        write_json(self.directory / MANIFEST, {**started, **environment(), "started": _now()})

    def finish(self, **results: Any) -> None:
        """Record that the step is finished, with its results."""
        found = self.manifest() or {}
        write_json(self.directory / MANIFEST, {**found, "status": FINISHED, "ended": _now(), **results})

    def results(self) -> dict[str, Any]:
        """Return the manifest of a finished step.

        Raises:
            ArtefactError: the step is not finished, or was made from other inputs.
        """
        found = self.manifest()
        if found is None or found["status"] != FINISHED or (self.inputs and not self.is_finished()):
            raise ArtefactError(
                f"{self.directory}: not finished yet; run that step first (`latent-sft plan CONFIG` lists them)."
            )
        return found


class GivenStep(Step):
    """A folder of weights from elsewhere that a stage starts from: finished, and known by its content."""

    @property
    def outcome(self) -> str:
        """Fingerprint of the weights."""
        return self.fingerprint

    @property
    def final(self) -> Path:
        """The folder itself."""
        return self.directory

    def results(self) -> dict[str, Any]:
        """Return nothing: how it was made is not known."""
        return {}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            out += _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return out
    return [] if old == new else [f"{prefix[:-1]} was {old!r}, now {new!r}"]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
