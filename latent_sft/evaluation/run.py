"""Measure every trained model of an experiment on every split, with the same engine, grader and counts."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from latent_sft.config.benchmarks import benchmark
from latent_sft.config.experiment import Config
from latent_sft.config.schema import DataConfig, EvalConfig
from latent_sft.data.dataset import skipped_rows, tokenized_splits
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.evaluation.agreement import agreement, span_agreement
from latent_sft.evaluation.answers import answer_text
from latent_sft.evaluation.interventions import check_given, intervene, latent_sweep
from latent_sft.evaluation.score import score
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.inference.generate import Sampling
from latent_sft.inference.show import Reasoner
from latent_sft.inference.solve import Thinker, as_rows, solve
from latent_sft.method.types import LatentSpec, Soft
from latent_sft.methods import MODELS, method_of
from latent_sft.models.load import max_positions
from latent_sft.runs import MANIFEST, Step, fingerprint, write_json

log = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_p", "latent_noise", "seed")


class Problems(NamedTuple):
    """What is solved, and how.

    Attributes:
        rows: tokenised.
        source: what they were made from.
        skipped: how many were left out, by reason.
        settings: `eval`, with what a benchmark decides.
    """

    rows: Dataset
    source: str
    skipped: dict[str, int]
    settings: EvalConfig


def evaluate(
    config: Config,
    models: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    work: Workspace | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate trained models and write `<run>/eval/<model>/<split>.json`; what is there already is not done again.

    What is there under other settings is kept, as `<run>/eval/<model>/<split>/<fingerprint>/<split>.json`.

    Args:
        config: the experiment.
        models: of `methods.MODELS`; None takes all that are enabled.
        splits: `validation`, `test`, or benchmarks of `eval.sets`; None takes `eval.splits` and all of these.
        work: the opened experiment, where the caller has it.

    Returns:
        model -> split -> summary.

    Raises:
        ArtefactError: a model is not trained yet, or was trained with other settings.
        ConfigError: no such model.
    """
    work = work or Workspace(config)
    for name in models or ():
        if name not in MODELS:
            raise ConfigError(f"--model: unknown model {name!r}.{did_you_mean(name, MODELS, shown=len(MODELS))}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, stages in config.models().items():
        if models and name not in models:
            continue
        source = work.step(stages[-1])
        if not source.is_finished():
            source.results()  # says what to do
        for split in splits or (*config.eval.splits, *config.sets()):
            if split not in work.data and split not in config.sets():
                log.warning("eval: there is no %s split, skipped.", split)
                continue
            summary = _evaluate_one(config, work, name, source, split, problems_of(work, split))
            if summary is not None:
                found.setdefault(name, {})[split] = summary
    return found


def problems_of(work: Workspace, split: str) -> Problems:
    """Return the problems of a split, or of a benchmark of `eval.sets`."""
    config = work.config
    if split in work.data:
        rows = work.data[split]  # first, since it makes what else is read here
        left_out = skipped_rows(work.directory / "data" / split)
        return Problems(rows, work.splits.sources.get(split, ""), left_out, config.eval)
    text = config.eval.sets[config.sets().index(split)]
    longest = max_positions(work.base, config.model)
    folder = work.directory / "data" / "sets"
    return problems_of_set(text, config, work.tokenizer, work.spec, folder, longest)


def problems_of_set(
    text: str, config: Config, tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, folder: Path, longest: int | None
) -> Problems:
    """Return the problems of a benchmark, tokenised below a folder.

    Args:
        text: `NAME` or `NAME=SOURCE`.
        config: its limits and sampling count.
        tokenizer: of the model.
        spec: of the model.
        folder: where tokenised benchmarks are kept.
        longest: positions that the model has.
    """
    chosen = benchmark(text)
    data, settings = chosen.data(config.data), chosen.settings(config.eval)
    found = problems_of_data(data, settings, tokenizer, spec, folder / chosen.name, longest)
    if (count := len(found.rows) + sum(found.skipped.values())) != chosen.rows:
        log.warning("%s: %s has %d rows, but the published set %d", chosen.name, chosen.source, count, chosen.rows)
    return found


def problems_of_data(
    data: DataConfig,
    settings: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    spec: LatentSpec,
    folder: Path,
    longest: int | None,
) -> Problems:
    """Return the test split of a `data` section, tokenised in a folder; see `problems_of_set`."""
    splits = load_splits(data)
    rows = tokenized_splits(data, tokenizer, spec, splits, folder, longest)["test"]
    return Problems(rows, splits.sources["test"], skipped_rows(folder / "test"), settings)


def decided_by(experiment: Experiment, name: str, settings: EvalConfig | None = None) -> dict[str, Any]:
    """Return what decides the evaluations of a model, whatever the split, beside its weights and the problems.

    Args:
        experiment: opened, or as its configuration tells.
        name: of the model.
        settings: where they are not those of the experiment.
    """
    config = experiment.config
    own = MODELS[name].identity(config.settings(method_of(name).settings))
    return {"thinker": name, "eval": deciding(settings or config.eval), "spec": experiment.of_spec, **own}


def deciding(settings: EvalConfig) -> dict[str, Any]:
    """Return the settings that decide an answer or its grade."""
    found = dataclasses.asdict(settings)
    for unused in ("splits", "sets", "batch_size", "heatmap_problems", *(() if settings.sample else SAMPLING)):
        del found[unused]
    return found


def _evaluate_one(
    config: Config, work: Workspace, name: str, source: Step, split: str, problems: Problems
) -> dict[str, Any] | None:
    step = _step(work, name, source, split, problems)
    path = work.directory / "eval" / name / f"{split}.json"
    if (kept := kept_result(step, path)) is not None:
        return kept
    own = config.settings(method_of(name).settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    thinker = MODELS[name].load(source.final, config.model, work.spec, own, device)
    reasoner = Reasoner(checkpoint=str(source.final), spec=work.spec, thinker=thinker, tokenizer=work.tokenizer)
    names = _interventions(work, name, split)
    return evaluate_step(step, path, reasoner, problems, name=name, split=split, interventions=names)


def kept_result(step: Step, path: Path) -> dict[str, Any] | None:
    """Return the summary of an evaluation that is there already; one under other settings is set aside."""
    _set_aside(step, path)
    return step.results()["summary"] if step.is_finished() and path.exists() else None


def evaluate_step(
    step: Step,
    path: Path,
    reasoner: Reasoner,
    problems: Problems,
    *,
    name: str,
    split: str,
    interventions: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Solve and grade problems, write the result and return its summary; None where no row can be used.

    Args:
        step: of this evaluation.
        path: of the result.
        reasoner: the model, how it thinks, its tokenizer and spec.
        problems: what to solve, and how.
        name: of the model, in the result.
        split: of the problems, in the result.
        interventions: see `eval.interventions`.
    """
    thinker, spec, settings = reasoner.thinker, reasoner.spec, problems.settings
    rows, skipped = as_rows(problems.rows, settings.limit), dict(problems.skipped)
    if thinker.oracle is not None:
        with_cot = [r for r in rows if r["cot"]]
        skipped |= {"no usable CoT": len(rows) - len(with_cot)} if len(with_cot) < len(rows) else {}
        rows = with_cot
    if not rows:
        log.warning("eval: no row of %s has a CoT that %s could encode, skipped.", split, name)
        return None
    sampling = Sampling(**{key: getattr(settings, key) for key in SAMPLING}) if settings.sample else None
    step.begin(settings.seed)
    alone = _seconds_alone(thinker, spec, rows[: settings.latency_problems], settings.max_cot_tokens)
    repeated = [row for row in rows for _ in range(settings.num_samples)]
    began = time.perf_counter()
    with tqdm(total=len(repeated), desc=f"eval {name} {split}", unit="problem") as bar:
        limits = {"batch_size": settings.batch_size, "max_cot_tokens": settings.max_cot_tokens}
        decoded = solve(thinker, spec, repeated, **limits, sampling=sampling, progress=bar.update)
    seconds = time.perf_counter() - began
    grading = {"decode_text": partial(answer_text, reasoner.tokenizer), "grader": settings.grader}
    counts = {"samples_per_problem": settings.num_samples, "heatmap_problems": settings.heatmap_problems}
    summary, records = score(decoded, rows, spec=spec, wall_seconds=seconds, **counts, **grading)
    if skipped:
        summary["skipped"] = skipped
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        log.warning("eval %s %s: the accuracy is without rows that were skipped (%s)", name, split, reasons)
    summary |= alone
    first = decoded[:: settings.num_samples]
    summary |= agreement(first, rows)
    if thinker.spans_of is not None:
        summary |= span_agreement(first, rows, thinker.spans_of)
    sweeps = first[0].latent_ids is not None and thinker.oracle is None and not isinstance(thinker.mixture, Soft)
    if settings.latent_sweep and sweeps:
        summary["latent_sweep"] = latent_sweep(
            thinker, spec, rows, settings.latent_sweep, batch_size=settings.batch_size, **grading
        )
    if interventions:
        options = {"names": interventions, "batch_size": settings.batch_size, **grading}
        found = intervene(thinker.lm, spec, rows, first, **options)
        if not settings.sample:
            check_given(found, summary["accuracy"], f"{name} {split}")
        summary["interventions"] = found
    write_json(path, {"model": name, "split": split, "summary": summary, "problems": records})
    step.finish(summary=summary)
    return summary


def _seconds_alone(
    thinker: Thinker, spec: LatentSpec, rows: Sequence[dict[str, Any]], max_cot_tokens: int
) -> dict[str, float]:
    """Return the time of a problem that is solved alone, greedily; what comes after finds everything warm."""
    if not rows:
        return {}
    for some in (rows[:1], rows):  # the first one is not timed
        began = time.perf_counter()
        solve(thinker, spec, some, batch_size=1, max_cot_tokens=max_cot_tokens)
    return {"seconds_alone": (time.perf_counter() - began) / len(rows)}


def _step(work: Workspace, name: str, source: Step, split: str, problems: Problems) -> Step:
    decided = decided_by(work, name, problems.settings)
    inputs = decided | {
        "model": source.outcome,
        "trained": source.results().get("ended"),  # the same stage may have been trained anew
        "split": split,
        "data": problems.source,
        "rows": fingerprint(list(problems.rows["hash"])),  # as tokenised, and which of them
        "eval": decided["eval"] | {"interventions": _interventions(work, name, split)},
    }
    return Step(directory=work.directory / "eval" / name / split, inputs=inputs)


def _set_aside(step: Step, result: Path) -> None:
    # evaluations under other settings are done anew without asking, so what there was must not be lost
    found = step.manifest()
    if found is None or found["fingerprint"] == step.fingerprint:
        return
    if result.exists():
        kept = step.directory / found["fingerprint"]
        kept.mkdir(exist_ok=True)
        os.replace(result, kept / result.name)
        os.replace(step.directory / MANIFEST, kept / MANIFEST)
        changed = "; ".join(step.changes(found)[:4]) or "inputs differ"
        log.warning("%s: evaluated anew (%s); the earlier result is kept in %s.", result, changed, kept)
    else:
        (step.directory / MANIFEST).unlink()  # of an evaluation that came to nothing


def _interventions(work: Workspace, name: str, split: str) -> list[str]:
    # on the split the report is about; without reasoning there is nothing to change
    chosen = "test" if "test" in work.data else "validation"
    return list(work.config.eval.interventions) if split == chosen and MODELS[name].reasons else []
