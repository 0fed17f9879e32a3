"""Every error a user can cause, and the "did you mean" helper. Imports nothing of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

STOPPED = 75
"""Exit status of a job that was told to stop and can go on: EX_TEMPFAIL of sysexits.h."""


class LatentSFTError(Exception):
    """Base of all errors the package raises for the user: what, where, what was expected, what to do."""


class ConfigError(LatentSFTError):
    """A configuration value or key is wrong; the message starts with the dotted key."""


class DataError(LatentSFTError):
    """A data file or row is wrong; the message starts with `file:line` and the field."""


class ArtefactError(LatentSFTError):
    """Something a previous stage wrote is missing, damaged, or belongs to other settings."""


class ExportError(LatentSFTError):
    """A checkpoint could not be exported or pushed."""


class TrainingError(LatentSFTError):
    """Training cannot go on (non-finite loss, no data left, a rank without rows)."""


class Interrupted(BaseException):
    """The job was told to stop (SIGTERM, SIGUSR1) and what is done so far is saved; no Exception, as KeyboardInterrupt.

    The process ends with status `STOPPED`.
    """


def did_you_mean(word: str, known: Iterable[str], *, shown: int = 8) -> str:
    """Return ` Did you mean 'x'?`, or the known names where nothing is near.

    >>> did_you_mean("rat", ["rate", "top_k"])
    " Did you mean 'rate'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    listed = ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
    return f" Known: {listed}."
