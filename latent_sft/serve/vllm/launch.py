"""`latent-sft serve --engine vllm`: the command of vLLM that serves a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from latent_sft.errors import ConfigError
from latent_sft.export.remote import REMOTE_FILE


def command(checkpoint: str | Path, host: str = "127.0.0.1", port: int = 8000, more: Sequence[str] = ()) -> list[str]:
    """Return the command that serves an export with vLLM; run it by `os.execvp`, or as a process.

    Args:
        checkpoint: folder of an export, or Hub name of one.
        host: to listen on.
        port: likewise.
        more: options of `vllm serve`, passed on.

    Raises:
        ConfigError: vLLM is not installed, or a folder is no export.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("serve: vLLM is not installed; pip install 'latent_sft[vllm]'.")
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / REMOTE_FILE).is_file():
        raise ConfigError(f"{checkpoint}: not an export, which vLLM needs; make one with latent-sft export.")
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
    return [*vllm, "--host", host, "--port", str(port), "--reasoning-parser", "latent_sft", *more]
