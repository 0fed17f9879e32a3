"""Measure every trained model of an experiment on every split, with the same engine, grader and counts."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from latent_sft.config.schema import Config
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.evaluation.score import score
from latent_sft.inference.generate import Sampling
from latent_sft.inference.solve import as_rows, solve
from latent_sft.models.load import load_lm
from latent_sft.runs import Step, write_json
from latent_sft.train.stages import STAGES, load_stage1
from latent_sft.workspace import STAGE1_PHASES, Workspace

log = logging.getLogger(__name__)

MODELS = ("no-cot", "cot", "stage1", "latent-sft")


def evaluate(
    config: Config,
    models: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    work: Workspace | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate trained models and write `<run>/eval/<model>/<split>.json`; what is there already is not done again.

    Args:
        config: the experiment.
        models: of MODELS; None takes all that are enabled.
        splits: `validation`, `test`; None takes `eval.splits`.
        work: the opened experiment, where the caller has it.

    Returns:
        model -> split -> summary.
    """
    work = work or Workspace(config)
    for name in models or ():
        if name not in MODELS:
            raise ConfigError(f"--model: unknown model {name!r}.{did_you_mean(name, MODELS)}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, stages in evaluated_models(work).items():
        if models and name not in models:
            continue
        source = stages[-1]
        source.results()
        for split in splits or config.eval.splits:
            if split not in work.data:
                log.warning("eval: there is no %s split, skipped.", split)
                continue
            found.setdefault(name, {})[split] = _evaluate_one(config, work, name, source, split)
    return found


def _evaluate_one(config: Config, work: Workspace, name: str, source: Step, split: str) -> dict[str, Any]:
    settings = config.eval
    step = Step(
        directory=work.directory / "eval" / name / split,
        inputs={
            "model": source.fingerprint,
            "split": split,
            "data": work.splits.sources.get(split, ""),
            "eval": dataclasses.asdict(settings) | {"splits": None},
            "decode": {"max_latents": work.spec.max_latents, "min_latents": work.spec.min_latents},
        },
    )
    path = work.directory / "eval" / name / f"{split}.json"
    if step.is_finished() and path.exists():
        return step.results()["summary"]
    thinker = STAGES[source.directory.name].thinker
    rows = as_rows(work.data[split], settings.limit)
    if thinker == "gold":
        rows = [r for r in rows if r["cot"]]
    model = _load(work, source, thinker)
    sampling = None
    if settings.sample:
        sampling = Sampling(
            temperature=settings.temperature, top_p=settings.top_p, latent_noise=True, seed=settings.seed
        )
    step.begin(settings.seed)
    repeated = [row for row in rows for _ in range(settings.num_samples)]
    began = time.perf_counter()
    with tqdm(total=len(repeated), desc=f"eval {name} {split}", unit="problem") as bar:
        decoded = solve(
            thinker,
            model,
            work.spec,
            repeated,
            batch_size=settings.batch_size,
            max_cot_tokens=settings.max_cot_tokens,
            sampling=sampling,
            progress=bar.update,
        )
    summary, problems = score(
        decoded,
        rows,
        spec=work.spec,
        decode_text=lambda ids: work.tokenizer.decode(ids, skip_special_tokens=False),
        grader=settings.grader,
        samples_per_problem=settings.num_samples,
        wall_seconds=time.perf_counter() - began,
        heatmap_problems=settings.heatmap_problems,
    )
    write_json(path, {"model": name, "split": split, "summary": summary, "problems": problems})
    step.finish(summary=summary)
    return summary


def evaluated_models(work: Workspace) -> dict[str, list[Step]]:
    """Return the models of an experiment and the training stages of each; the last one holds the weights."""
    config = work.config
    phases = [work.step(p) for p in STAGE1_PHASES if config.stage(p).enabled]
    table = {
        "no-cot": [work.step("no-cot")] if config.no_cot.enabled else [],
        "cot": [work.step("cot")] if config.cot.enabled else [],
        "stage1": phases,
        "latent-sft": [work.step("stage2")] if config.stage2.enabled else [],
    }
    return {name: stages for name, stages in table.items() if stages}


def _load(work: Workspace, source: Step, thinker: str) -> nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if thinker == "gold":
        return load_stage1(work, source.final).to(device)
    return load_lm(source.final, work.config.model).to(device)
