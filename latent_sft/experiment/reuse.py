"""Finished steps of one run taken over by another one with the same settings, as hard links where the disk allows.

What a step depends on is compared by sections of the configuration: where they are equal, the inputs of the step are.
The run that takes a step over compares its fingerprint as always.
"""

from __future__ import annotations

import logging
import os
import shutil
from operator import attrgetter
from pathlib import Path

from latent_sft.config.experiment import Config
from latent_sft.errors import ArtefactError
from latent_sft.methods import STAGES
from latent_sft.runs import FINISHED, LOCK, MANIFEST, read_json

log = logging.getLogger(__name__)

_START = ("seed", "model", "data", "prompt")
# folder -> sections that decide it; tokenised data has no manifest: each of its files says what it was made from
STEPS: dict[str, tuple[str, ...]] = {
    "base": _START,
    "data": (*_START, "latent"),
    "no-cot": (*_START, "no_cot"),
    "cot": (*_START, "cot"),
    "eval/no-cot": (*_START, "no_cot", "latent", "eval"),
    "eval/cot": (*_START, "cot", "latent", "eval"),
}


def reuse_steps(source: Config, target: Config) -> list[str]:
    """Give `target`'s run what `source`'s run has finished and both would make alike; what is there stays.

    Returns:
        The folders taken over.

    Raises:
        ArtefactError: the files could be neither linked nor copied.
    """
    taken = []
    for name, sections in STEPS.items():
        stage = name.removeprefix("eval/")
        wanted = stage not in STAGES or target.stage(stage).enabled
        old, new = Path(source.directory) / name, Path(target.directory) / name
        same = all(attrgetter(key)(source) == attrgetter(key)(target) for key in sections)
        if wanted and same and not new.exists() and _is_finished(old):
            _take(old, new)
            taken.append(name)
    return taken


def _is_finished(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    manifests = [folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")]  # an evaluation has one a split
    found = [read_json(path).get("status") for path in manifests if path.exists()]
    return all(status == FINISHED for status in found) and (bool(found) or folder.name == "data")


def _take(old: Path, new: Path) -> None:
    part = new.with_name(f".{new.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a comparison that was killed here
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        # the lock of a folder must be its own; checkpoints of a finished stage are of no more use
        left_out = shutil.ignore_patterns(LOCK, "checkpoint-*", ".*.part")
        shutil.copytree(old, part, copy_function=_link, ignore=left_out)
        part.rename(new)
    except OSError as error:  # shutil.Error is one
        shutil.rmtree(part, ignore_errors=True)
        raise ArtefactError(f"{new}: could not be taken over from {old} ({error}).") from error


def _link(old: str, new: str) -> str:
    try:
        os.link(old, new)
    except OSError:  # another file system, or one without links
        shutil.copy2(old, new)
    return new
