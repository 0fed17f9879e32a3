"""Whether two mathematical expressions are equal, by math-verify, in a process that can be killed.

math-verify guards itself with SIGALRM, which works on the main thread only and cannot interrupt one long operation in
C (9**9**9). So expressions are compared in one child process with bounded memory, which is killed when it takes too
long and started again for the next pair. The child runs this very file.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading

START_SECONDS = 120.0  # importing sympy on a busy machine
MEMORY_BYTES = 4 << 30


def math_equal(prediction: str, reference: str, *, timeout: float = 10.0) -> bool:
    r"""Return whether math-verify takes two expressions for equal, as in `\frac{1}{2}` and `0.5`.

    Usable from any thread and after a fork. An expression that cannot be parsed, or that takes longer than `timeout`
    seconds, is not equal.

    Args:
        prediction: LaTeX or plain expression, without `$` or a box around it.
        reference: the gold expression; equality is not always symmetric.
        timeout: seconds for the pair.

    Raises:
        ImportError: math-verify is not installed.
    """
    with _LOCK:
        return _WORKER.ask([reference, prediction], timeout)


class _Worker:
    """The child process: started on first use, killed on a timeout, started again when needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, pair: list[str], timeout: float) -> bool:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(pair).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return False
        answer = self._read_line(timeout)
        if answer not in (b"0\n", b"1\n"):  # timeout, or the child died of its memory limit
            self.stop()
        return answer == b"1\n"

    def stop(self) -> None:
        """Kill the child, if this process started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> None:
        # -P keeps the folder of this file, which holds modules with common names, off the child's import path
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._owner = os.getpid()
        if self._read_line(START_SECONDS) != b"ready\n":
            self._process.kill()
            why = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            self._process = None
            raise ImportError(
                f"math-verify cannot be loaded ({why[-1] if why else 'no answer'}): pip install math-verify"
            )

    def _read_line(self, timeout: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else b""  # the child writes whole lines only


_LOCK = threading.Lock()
_WORKER = _Worker()
atexit.register(_WORKER.stop)


def _serve() -> None:
    import contextlib
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeout is off
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        gold, prediction = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        equal = bool(gold and prediction and verify(gold, prediction, timeout_seconds=None))
        sys.stdout.write("1\n" if equal else "0\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
