"""Score a checkpoint without its experiment, on a file of problems or on benchmarks: `latent-sft eval CHECKPOINT`.

Prompt, lengths and way of thinking are the checkpoint's own. What is written is what an experiment writes, below a
folder of its own: `<out>/eval/<name>/<split>.json`, and the tokenised problems in `<out>/data`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latent_sft.config.benchmarks import benchmark, benchmarks
from latent_sft.config.experiment import Config
from latent_sft.config.load import load_config
from latent_sft.config.schema import LatentConfig
from latent_sft.data.dataset import tokenizer_fingerprint
from latent_sft.data.readers import HUB
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.evaluation.results import Row
from latent_sft.evaluation.run import deciding, evaluate_step, kept_result, problems_of_data, problems_of_set
from latent_sft.inference.show import load, local_folder
from latent_sft.method.types import LatentSpec
from latent_sft.models.load import read_thinker, weights_fingerprint
from latent_sft.runs import Step, fingerprint

# settings that count here: how rows are read, what is measured, and how thinking and answering end
DATA = (
    "test",
    "format",
    "cot_style",
    "on_error",
    "limit_test",
    "step_separator",
    "max_prompt_tokens",
    "max_cot_tokens",
)
LATENT = ("min_latents", "max_latents", "max_answer_tokens", "noise_scale")


class Scored(NamedTuple):
    """What a checkpoint scored: a row for each set of problems, as in a report, and the folder of the results."""

    rows: list[Row]
    folder: Path


def evaluate_checkpoint(
    checkpoint: str, overrides: Sequence[str] = (), *, thinker: str | None = None, out: Path | None = None
) -> Scored:
    """Evaluate a checkpoint on `data.test`, where that is given, and on `eval.sets`; what is there is not done again.

    Args:
        checkpoint: exported folder, `final` folder of a stage, or Hub name.
        overrides: `key=value` settings of an experiment, as far as they mean something here.
        thinker: `none` answers at once; as trained by default.
        out: folder for the results; `runs/eval/` and the last two names of the checkpoint's path by default.

    Raises:
        ConfigError: a setting that means nothing here, or nothing to score.
        ArtefactError: not a checkpoint.
        DataError: the problems cannot be had, or a row is bad (data.on_error=skip leaves it out).
    """
    folder = local_folder(checkpoint)
    reasoner = load(folder)
    config = _config(reasoner.spec, overrides)
    changed = {key: value for key in LATENT if (value := getattr(config.latent, key)) != getattr(reasoner.spec, key)}
    reasoner = dataclasses.replace(reasoner, checkpoint=checkpoint).adjusted(thinker, **changed)
    parts = Path(checkpoint).resolve().parts[-2:] if Path(checkpoint).is_dir() else tuple(checkpoint.split("/"))
    out = out or Path("runs/eval", "--".join(parts))
    name = parts[-1] if thinker in (None, read_thinker(folder)[0]) else f"{parts[-1]}-{thinker}"
    tokenizer, spec, home = reasoner.tokenizer, reasoner.spec, out / "data"
    longest = getattr(reasoner.thinker.lm.config.get_text_config(), "max_position_embeddings", None)
    found = {}
    if config.data.test:
        split = _name_of(config.data.test)
        found[split] = problems_of_data(config.data, config.eval, tokenizer, spec, home / split, longest)
    for text in config.eval.sets:
        found[benchmark(text).name] = problems_of_set(text, config, tokenizer, spec, home, longest)
    rows = []
    for split, problems in found.items():
        inputs = {
            "model": weights_fingerprint(folder, out / "weights.json"),
            "thinker": reasoner.thinker.kind,
            "trained": fingerprint(read_thinker(folder)),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "spec": spec.to_dict(),
            "eval": deciding(problems.settings),
            "split": split,
            "data": problems.source,
            "rows": fingerprint(list(problems.rows["hash"])),
        }
        step, path = Step(directory=out / "eval" / name / split, inputs=inputs), out / "eval" / name / f"{split}.json"
        summary = kept_result(step, path)
        if summary is None:
            asked = list(problems.settings.interventions) if reasoner.thinker.kind != "none" else []
            summary = evaluate_step(step, path, reasoner, problems, name=name, split=split, interventions=asked)
        rows.append({"model": name, "split": split, **(summary or {})})
    return Scored(rows, out / "eval" / name)


def _config(spec: LatentSpec, overrides: Sequence[str]) -> Config:
    known = [f"data.{key}" for key in DATA] + [f"latent.{key}" for key in LATENT]
    for text in overrides:
        key = text.partition("=")[0]
        if key not in known and not key.startswith(("data.fields.", "eval.")):
            hint = did_you_mean(key, known, shown=len(known))
            raise ConfigError(
                f"{key}: means nothing for a checkpoint; expected eval.*, data.fields.*, or others.{hint}"
            )
    lengths = {field.name: getattr(spec, field.name) for field in dataclasses.fields(LatentConfig)}
    own = [f"latent.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in lengths.items()]
    # interventions multiply the cost, so they are made where they are asked for
    config = load_config(None, [*own, "data.test=", "eval.interventions=[]", *overrides])
    if not config.data.test and not config.eval.sets:
        names = ", ".join(benchmarks())
        raise ConfigError(f"eval: got nothing to score; expected --data FILE, or --set NAME of {names}.")
    return config


def _name_of(source: str) -> str:
    """Return a name for the problems of a source: of a file without its ending, of a Hub data set with its split."""
    if source.startswith(HUB):
        return re.sub(r"[^\w.-]+", "-", source.removeprefix(HUB))
    return Path(source).name.split(".")[0]
