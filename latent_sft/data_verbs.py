"""The verbs about data, `data` and `sample`, and how a verb reads its experiment; the others are in `cli.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latent_sft.errors import ConfigError

if TYPE_CHECKING:
    from latent_sft.config.experiment import Config

Verb = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add(verb: Verb, experiment: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> None:
    """Add the verbs to the command.

    Args:
        verb: adds one, of a name, a handler and a line about it.
        experiment: gives one CONFIG and settings.
    """
    data = experiment(verb("data", _data, "what was read, and training rows as every stage will see them"))
    data.add_argument("--rows", type=int, default=5, metavar="N", help="training rows to show (5)")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    sample = experiment(
        verb("sample", _sample, "training rows that a model writes: answers to problems, right ones kept")
    )
    sample.add_argument("--data", metavar="FILE", help="problems with answers, in any format that training reads")
    sample.add_argument("--split", help="of the experiment, instead of --data: train, validation or test; train")
    sample.add_argument("--model", default="cot", help="of the experiment (cot)")
    sample.add_argument("--n", type=int, default=8, metavar="N", help="answers to each problem (8)")
    sample.add_argument("--keep", choices=("shortest", "first", "all"), default="shortest", help="which right ones")
    sample.add_argument("--max-tokens", type=int, default=0, metavar="N", help="keep no longer chains; no limit")
    sample.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N problems; all")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")


def load(args: argparse.Namespace) -> Config:
    """Return the experiment of a file or preset, with the settings of the command line."""
    from latent_sft.config.load import load_config
    from latent_sft.config.presets import resolve_config

    args.config = resolve_config(args.config)
    return load_config(args.config, args.overrides)


def load_one(args: argparse.Namespace) -> Config:
    """Return one experiment.

    Raises:
        ConfigError: the file is a comparison of several.
    """
    config = load(args)
    if config.compare.variants:
        raise ConfigError(
            f"{args.verb}: {args.config} is a comparison (compare.variants), expected one experiment. Its runs have "
            f"files of their own once begun: {config.directory}/VARIANT/seed-N/config.yaml."
        )
    return config


def _data(args: argparse.Namespace) -> None:
    config = load_one(args)
    from latent_sft.preview import as_text, preview

    found = preview(config, args.rows)
    print(json.dumps(found, ensure_ascii=False) if args.json else as_text(found))


def _sample(args: argparse.Namespace) -> None:
    from latent_sft.config.load import load_config

    if args.n < 1:
        raise ConfigError(f"--n: got {args.n}, expected 1 or more.")
    # a folder or a name of the Hub is a checkpoint, anything else an experiment
    path = Path(args.config)
    checkpoint = path.is_dir() or ("/" in args.config and not path.exists() and path.suffix not in (".yaml", ".yml"))
    if checkpoint and (not args.data or args.split):
        raise ConfigError(f"--data: expected a file of problems, because {args.config} is a checkpoint.")
    if args.data and args.split:
        raise ConfigError("--split: is of the experiment's own data; give either it or --data.")
    config = load_config(None, ["data.format=auto", *args.overrides]) if checkpoint else load_one(args)
    from latent_sft.evaluation import sample

    work = None if checkpoint else sample.Workspace(config)
    found = sample.of_checkpoint(args.config, args.out) if work is None else sample.of_run(config, args.model, work)
    splits = sample.problems_of(config, args.data) if args.data or work is None else work.splits
    how = {"count": args.n, "keep": args.keep, "longest": args.max_tokens, "limit": args.limit, "settings": config.eval}
    summary = sample.sample(found, splits, "test" if args.data else args.split or "train", args.out, **how)
    print(sample.as_text(summary, args.out))
