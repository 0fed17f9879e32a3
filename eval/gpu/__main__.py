"""`python -m eval.gpu`: what a GPU has to show, in parts of at most 8 minutes.

python -m eval.gpu --list                   the parts
python -m eval.gpu --minutes 14             all that is not done yet, for a machine that is lent for 14 minutes
python -m eval.gpu --part mfu               parts whose names begin so
python -m eval.gpu --device cpu --tiny      what can be checked without a GPU
python -m eval.gpu --table                  what the results in --out say, as tables
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from eval.gpu import backends, decode, graphs, mfu, stages, sync, tables, training
from eval.gpu.parts import Part, Settings, failures, run
from latent_sft.runs import read_json

PARTS = (
    Part("backends", "Attention backends and chunked losses equal their definitions", backends.cases),
    Part("sync", "The host waits for the device neither in training steps nor in decoding steps", sync.cases),
    Part("graphs", "CUDA graphs of the decoding step equal the plain step", graphs.cases),
    Part("stages", "Every stage, two steps in bf16 with LoRA", stages.cases),
    Part("zero", "ZeRO on one GPU equals no ZeRO", stages.zero_cases),
    Part("mfu-llama", "MFU and memory, Llama-1B", mfu.llama_cases),
    Part("mfu-qwen", "MFU and memory, Qwen-7B with LoRA", mfu.qwen_cases),
    Part("mfu-long-llama", "MFU and memory on long CoTs, Llama-1B", mfu.long_llama_cases),
    Part("mfu-long-qwen", "MFU and memory on long CoTs, Qwen-7B with LoRA", mfu.long_qwen_cases),
    Part("decode", "Decoding against transformers' generate, Llama-1B", decode.cases),
    *(
        Part(f"train-{name}", f"Training from scratch: {what}", partial(training.cases, experiment=name))
        for name, what in (("4x4", "4x4 multiplication"), ("5x5", "5x5 multiplication"), ("prosqa", "ProsQA graphs"))
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 1 where something failed or is not equal, 2 where time did not suffice."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="only parts that begin so")
    parser.add_argument("--list", action="store_true", help="the parts, and nothing else")
    parser.add_argument("--table", action="store_true", help="tables of the results that are there, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="until the machine is gone; begins no case too late"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    options = parser.parse_args(argv)
    chosen = [part for part in PARTS if part.name.startswith(tuple(options.part) or "")]
    if not chosen:
        parser.error(f"--part {' '.join(options.part)}: expected some of {', '.join(part.name for part in PARTS)}")
    if options.list:
        sys.stdout.write("".join(f"{part.name:16}{part.meaning}\n" for part in chosen))
        return 0
    if options.device == "cuda" and not options.table and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; --device cpu --tiny checks what can be without")
    until = time.monotonic() + 60 * options.minutes
    settings = Settings(device=options.device, tiny=options.tiny, out=options.out.absolute(), until=until)
    late = [] if options.table else [part.name for part in chosen if not run(part, settings)]
    paths = {part.name: settings.out / f"{part.name}.json" for part in chosen}
    records = [read_json(path) for path in paths.values() if path.exists()]
    meanings = {part.name: part.meaning for part in PARTS}
    sys.stdout.write("\n\n".join(tables.to_markdown(record, meanings[record["part"]]) for record in records) + "\n")
    wrong = list(failures(records))
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    if late:
        sys.stderr.write(f"Time did not suffice for {', '.join(late)}; the same command goes on.\n")
    return 1 if wrong else 2 if late else 0


if __name__ == "__main__":
    sys.exit(main())
