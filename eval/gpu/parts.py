"""What a part is: cases with results, run one after the other, each written at once."""

from __future__ import annotations

import hashlib
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from latent_sft.runs import read_json, write_json

ROOT = Path(__file__).parents[2]
MOST_MINUTES = 8.0
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the proof is run.

    Attributes:
        device: `cuda` or `cpu`.
        tiny: sizes that a CPU runs in seconds.
        out: folder of the results.
        until: `time.monotonic()` at which the machine is gone.
    """

    device: str
    tiny: bool
    out: Path
    until: float

    @property
    def minutes(self) -> float:
        """What is left."""
        return (self.until - time.monotonic()) / 60


class Case(NamedTuple):
    """One line of a table.

    Attributes:
        name: unique within the part.
        run: -> a flat result. `same`: whether what is compared is equal; no other number of a case counts where it is
            not. `finished: False` where it was stopped and goes on at the next call.
        minutes: it takes at most, on the slowest GPU of the table.
    """

    name: str
    run: Callable[[], Result]
    minutes: float = 1.0


class Part(NamedTuple):
    """Cases that take at most MOST_MINUTES together.

    Attributes:
        name: on the command line, and of its file.
        meaning: one line.
        cases: settings -> cases.
    """

    name: str
    meaning: str
    cases: Callable[[Settings], Sequence[Case]]


def run(part: Part, settings: Settings) -> bool:
    """Run the cases that have no result yet; return whether there was time for all of them."""
    path, key = settings.out / f"{part.name}.json", key_of(settings)
    record = read_json(path) if path.exists() else {}
    if record.get("key") != key:
        record = {"part": part.name, "key": key, "cases": {}}
    for case in part.cases(settings):
        before = record["cases"].get(case.name, {})
        if before.get("finished"):
            continue
        if settings.minutes < case.minutes:
            return False
        began = time.monotonic()
        try:
            result = {"finished": True, **case.run()}
        except torch.OutOfMemoryError as error:  # a result like any other
            result = {"finished": True, "same": True, "out of memory": str(error).splitlines()[0]}
        except Exception as error:  # one case that fails says nothing about the others
            result = {"finished": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        record["cases"][case.name] = {**result, "seconds": time.monotonic() - began}
        write_json(path, record)
        if "CUDA error" in result.get("error", ""):
            raise SystemExit(f"{part.name}, {case.name}: the device is of no use after this. {result['error']}")
    return True


def failures(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what failed or is not equal."""
    for record in records:
        for name, result in record["cases"].items():
            if "error" in result or not result.get("same", True):
                yield f"{record['part']}, {name}: {result.get('error', 'not the same')}"


def key_of(settings: Settings) -> dict[str, Any]:
    """Return what decides results: a record of anything else is begun anew."""
    files = sorted(path for folder in ("latent_sft", "eval") for path in (ROOT / folder).rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"code": code, "device": f"{settings.device}: {gpu}", "tiny": settings.tiny, **versions}
