"""Measure every trained model of an experiment on every split, with the same engine, grader and counts."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from latent_sft.config.experiment import Config
from latent_sft.data.dataset import skipped_rows
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.evaluation.agreement import agreement, span_agreement
from latent_sft.evaluation.answers import answer_text
from latent_sft.evaluation.interventions import check_given, intervene, latent_sweep
from latent_sft.evaluation.score import score
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.inference.generate import Sampling
from latent_sft.inference.solve import Thinker, as_rows, solve
from latent_sft.method.types import Soft
from latent_sft.methods import MODELS, method_of
from latent_sft.runs import MANIFEST, Step, fingerprint, write_json

log = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_p", "latent_noise", "seed")


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
        splits: `validation`, `test`; None takes `eval.splits`.
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
        for split in splits or config.eval.splits:
            if split not in work.data:
                log.warning("eval: there is no %s split, skipped.", split)
                continue
            summary = _evaluate_one(config, work, name, source, split)
            if summary is not None:
                found.setdefault(name, {})[split] = summary
    return found


def decided_by(experiment: Experiment, name: str) -> dict[str, Any]:
    """Return what decides the evaluations of a model, whatever the split, beside its weights and the problems."""
    config = experiment.config
    settings = dataclasses.asdict(config.eval)
    for unused in ("splits", "batch_size", "heatmap_problems", *(() if config.eval.sample else SAMPLING)):
        del settings[unused]
    own = MODELS[name].identity(config.settings(method_of(name).settings))
    return {"thinker": name, "eval": settings, "spec": experiment.of_spec, **own}


def _evaluate_one(config: Config, work: Workspace, name: str, source: Step, split: str) -> dict[str, Any] | None:
    settings = config.eval
    step = _step(work, name, source, split)
    path = work.directory / "eval" / name / f"{split}.json"
    _set_aside(step, path)
    if step.is_finished() and path.exists():
        return step.results()["summary"]
    own = config.settings(method_of(name).settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    thinker = MODELS[name].load(source.final, config.model, work.spec, own, device)
    rows = as_rows(work.data[split], settings.limit)
    skipped = skipped_rows(work.directory / "data" / split)
    if thinker.oracle is not None:
        with_cot = [r for r in rows if r["cot"]]
        skipped |= {"no usable CoT": len(rows) - len(with_cot)} if len(with_cot) < len(rows) else {}
        rows = with_cot
    if not rows:
        log.warning("eval: no row of %s has a CoT that %s could encode, skipped.", split, name)
        return None
    sampling = Sampling(**{key: getattr(settings, key) for key in SAMPLING}) if settings.sample else None
    step.begin(settings.seed)
    alone = _seconds_alone(thinker, work, rows[: settings.latency_problems])
    repeated = [row for row in rows for _ in range(settings.num_samples)]
    began = time.perf_counter()
    with tqdm(total=len(repeated), desc=f"eval {name} {split}", unit="problem") as bar:
        limits = {"batch_size": settings.batch_size, "max_cot_tokens": settings.max_cot_tokens}
        decoded = solve(thinker, work.spec, repeated, **limits, sampling=sampling, progress=bar.update)
    seconds = time.perf_counter() - began
    grading = {"decode_text": _text_of(work), "grader": settings.grader}
    counts = {"samples_per_problem": settings.num_samples, "heatmap_problems": settings.heatmap_problems}
    summary, problems = score(decoded, rows, spec=work.spec, wall_seconds=seconds, **counts, **grading)
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
            thinker, work.spec, rows, settings.latent_sweep, batch_size=settings.batch_size, **grading
        )
    names = _interventions(work, name, split)
    if names:
        found = intervene(thinker.lm, work.spec, rows, first, names=names, batch_size=settings.batch_size, **grading)
        if not settings.sample:
            check_given(found, summary["accuracy"], f"{name} {split}")
        summary["interventions"] = found
    write_json(path, {"model": name, "split": split, "summary": summary, "problems": problems})
    step.finish(summary=summary)
    return summary


def _seconds_alone(thinker: Thinker, work: Workspace, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the time of a problem that is solved alone, greedily; what comes after finds everything warm."""
    if not rows:
        return {}
    for some in (rows[:1], rows):  # the first one is not timed
        began = time.perf_counter()
        solve(thinker, work.spec, some, batch_size=1, max_cot_tokens=work.config.eval.max_cot_tokens)
    return {"seconds_alone": (time.perf_counter() - began) / len(rows)}


def _step(work: Workspace, name: str, source: Step, split: str) -> Step:
    decided = decided_by(work, name)
    inputs = decided | {
        "model": source.outcome,
        "trained": source.results().get("ended"),  # the same stage may have been trained anew
        "split": split,
        "data": work.splits.sources.get(split, ""),
        "rows": fingerprint(list(work.data[split]["hash"])),  # as tokenised, and which of them
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


def _text_of(work: Workspace) -> Any:
    return lambda ids: answer_text(work.tokenizer, ids)
