"""Show an experiment as the shell commands it consists of, in order, with what is already finished."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from latent_sft.config.schema import STAGES, Config
from latent_sft.runs import FINISHED, Step
from latent_sft.variants import Job

MODELS = ("no-cot", "cot", "stage1", "latent-sft", "soft-thinking", "coconut", "codi", "pccot", "kava")
"""What is evaluated, in the order of tables."""

MEANINGS = {
    "no-cot": "baseline that answers without reasoning",
    "cot": "baseline that writes its reasoning; a starting point for stage 1 where stage1.init=cot",
    "stage1-encoder": "encoder learns to compress CoT chunks into latents, decoder frozen",
    "stage1-decoder": "decoder learns to read the latents, which the frozen encoder stores first",
    "stage1-union": "encoder and decoder together",
    "label": "the encoder's latents of every training problem, stored",
    "stage2": "the model learns to produce the latents by itself, then the answer",
    "coconut": "step after step of the CoT gives way to hidden states that are fed back",
    "codi": "one model as teacher with the CoT and as student with latents; hidden states before the answer agree",
    "pccot": "as codi, with all latents refined at once by Jacobi iterations",
    "kava": "as pccot, and the latents' keys and values follow the teacher's compressed cache",
    "eval": "accuracy and reasoning length of every trained model",
    "report": "tables and plots of the whole experiment",
    "export": "a plain Hugging Face folder of the trained model",
}


def steps(config: Config) -> list[str]:
    """Return the names of the steps this experiment runs, in order; a disabled stage is left out."""
    enabled = [stage for stage in STAGES if config.stage(stage).enabled]
    if "stage2" in enabled:
        enabled.insert(enabled.index("stage2"), "label")
    return [*enabled, "eval", "report", *(["export"] if "stage2" in enabled else [])]


def models_of(config: Config) -> dict[str, list[str]]:
    """Return the models this experiment evaluates, each with its own training stages; the last holds the weights."""
    phases = [stage for stage in STAGES if stage.startswith("stage1") and config.stage(stage).enabled]
    # Soft Thinking trains nothing: it runs the model of the cot stage
    stages = {"stage1": phases, "latent-sft": ["stage2"], "soft-thinking": ["cot"]}
    table = {name: stages.get(name, [name]) for name in MODELS}
    if not config.soft_thinking.enabled:
        del table["soft-thinking"]
    return {name: own for name, own in table.items() if own and all(config.stage(s).enabled for s in own)}


def plan(config: Config, config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a shell script: one comment and one command a step; what is finished is skipped when it is run.

    A step counts as finished here when its manifest says so; whether it still fits the settings is checked by the
    step itself.

    Args:
        config: the resolved experiment.
        config_path: the file the commands name.
        overrides: `key=value` settings every command repeats.
    """
    chosen = steps(config)
    lines = [f"# {config.name}: {len(chosen)} steps in {config.directory}, run one by one or with `| bash -e`"]
    usual = Config()  # the other methods are off where nobody asks for them
    skipped = [stage for stage in STAGES if stage not in chosen and usual.stage(stage).enabled]
    if skipped:
        lines.append(f"# disabled: {', '.join(skipped)}")
    for number, name in enumerate(chosen, start=1):
        lines += ["", f"# {number}. {name}: {MEANINGS[name]} [{_status(config, name)}]"]
        if name in STAGES and config.launch.nproc > 1:
            lines.append(f"# starts {config.launch.nproc} processes with torchrun (launch.nproc)")
        verb = ["train", name] if name in STAGES else [name]
        lines.append(shlex.join(["latent-sft", *verb, str(config_path), *overrides]))
    return "\n".join(lines) + "\n"


def plan_comparison(config: Config, jobs: Sequence[Job], config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a shell script with the command of a comparison, and a comment for each of its runs.

    Args:
        config: the comparison.
        jobs: its runs, see `variants.jobs_of`.
        config_path: the file the command names.
        overrides: `key=value` settings it repeats.
    """
    lines = [f"# {config.name}: {len(jobs)} runs below {config.directory}, {config.compare.jobs} at once"]
    for number, job in enumerate(jobs, start=1):
        trained = [stage for stage in STAGES if job.config.stage(stage).enabled]
        begun = "begun, not finished" if job.directory.exists() else "to do"
        status = "finished" if job.is_finished() else begun
        lines.append(f"# {number}. {job.name}: {', '.join(trained)} [{status}]")
    lines += ["", shlex.join(["latent-sft", "run", str(config_path), *overrides])]
    return "\n".join(lines) + "\n"


def _status(config: Config, name: str) -> str:
    run = Path(config.directory)
    if name in ("report", "export"):  # folders without a manifest, made in one go
        return "finished" if any((run / name).glob("*")) else "to do"
    folders = {"label": [run / "labels"], "eval": _evaluations(config)}.get(name, [run / name])
    manifests = [Step(directory=folder, inputs={}).manifest() for folder in folders]
    if all(found is not None and found["status"] == FINISHED for found in manifests):
        return "finished"
    return "begun, not finished" if any(manifests) else "to do"


def _evaluations(config: Config) -> list[Path]:
    splits = [split for split in config.eval.splits if split != "test" or config.data.test]
    return [Path(config.directory) / "eval" / model / split for model in models_of(config) for split in splits]
