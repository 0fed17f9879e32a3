"""`latent-sft serve`: its options, and what happens before the server runs."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from latent_sft.errors import ConfigError, Interrupted


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser the options of the verb."""

    def whole(least: int, most: int = 2**31) -> Callable[[str], int]:
        def parse(text: str) -> int:
            if not (text.isdecimal() and least <= int(text) <= most):
                raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least} to {most}")
            return int(text)

        return parse

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an exported folder, or a Hub name")
    parser.add_argument(
        "--engine",
        choices=("own", "vllm"),
        default="own",
        help="own: the decoding engine of this package; vllm: an installed vLLM (extra [vllm]), which takes --host, "
        "--port and --name, and its own settings from its configuration file or environment (own)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="port; 0 picks a free one (8000)")
    parser.add_argument("--name", help="of the model, for clients; that of the folder")
    parser.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="answers decoded together (64)")
    parser.add_argument("--max-waiting", type=whole(0), default=256, metavar="N", help="answers that may wait (256)")
    parser.add_argument("--max-length", type=whole(1), metavar="N", help="tokens of a prompt; as the model allows")
    parser.add_argument("--timeout", type=whole(1), default=300, metavar="S", help="seconds a request may take (300)")
    parser.add_argument("--device", help="as torch names it; the GPU where there is one")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="with the key that clients must send")


def launch(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Load the checkpoint and serve it until SIGTERM or SIGINT, which is how a server ends.

    Raises:
        ConfigError: the extra is not installed, or an option is wrong.
        ArtefactError: no checkpoint.
    """
    if args.engine == "vllm":
        from latent_sft.serve.vllm.launch import command

        words = command(args.checkpoint, args.host, args.port, ["--served-model-name", args.name] if args.name else [])
        os.execv(words[0], words)
    try:
        from latent_sft.serve.server import read_key, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: needs {error.name}; run pip install 'latent_sft[serve]'.") from error
    from latent_sft.inference.show import load

    key, reasoner = read_key(args.api_key_file), load(args.checkpoint, args.device)
    name = args.name or Path(args.checkpoint).resolve().name
    with contextlib.suppress(Interrupted, KeyboardInterrupt):
        serve(
            reasoner,
            name=name,
            host=args.host,
            port=args.port,
            batch_size=args.batch_size,
            most_waiting=args.max_waiting,
            longest=args.max_length,
            timeout=args.timeout,
            key=key,
            ready=lambda address: say(f"serving {name} at {address}"),
        )
