"""Show an experiment as the shell commands it consists of, in order, with what is already finished."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from latent_sft.config.experiment import Config
from latent_sft.errors import ConfigError
from latent_sft.experiment.variants import Job
from latent_sft.methods import MODELS, STAGES, method_of
from latent_sft.runs import FINISHED, Step

MEANINGS = {
    "eval": "accuracy and reasoning length of every trained model",
    "report": "tables and plots of the whole experiment",
    "export": "a plain Hugging Face folder of the trained model",
}


def steps(config: Config) -> list[str]:
    """Return the names of the steps this experiment runs, in order; a stage that is not enabled is left out.

    Raises:
        ConfigError: none is.
    """
    names: list[str] = []
    for name, stage in STAGES.items():
        if config.stage(name).enabled:
            names += [stage.reads.name, name] if stage.reads is not None and stage.reads.name else [name]
    if not names:
        raise ConfigError("no stage is enabled; expected one to be named, for example cot: {} in the file, or cot={}.")
    return [*names, "eval", "report", *(["export"] if exported(config) else [])]


def models_of(config: Config) -> dict[str, list[str]]:
    """Return the models this experiment evaluates, each with its own training stages; the last holds the weights."""
    found = {}
    for name, model in MODELS.items():
        own = [stage for stage in model.stages if config.stage(stage).enabled]
        trained = bool(own) if model.any_stage else own == list(model.stages)
        if trained and model.enabled(config.settings(method_of(name).settings)):
            found[name] = own
    return found


def exported(config: Config) -> dict[str, str]:
    """Return the latent reasoners of an experiment, each with the folder of its export: the first one is `export`."""
    names = [name for name in models_of(config) if MODELS[name].role == "latent"]
    return {name: f"export-{name}" if number else "export" for number, name in enumerate(names)}


def chosen_export(config: Config, model: str | None = None) -> tuple[str, str]:
    """Return a latent reasoner, the first one unless it is named, and the folder of its export.

    Raises:
        ConfigError: the experiment trains none of that name.
    """
    folders = exported(config)
    model = model or next(iter(folders), "")
    if model not in folders:
        raise ConfigError(
            f"export: got model {model!r}, expected a latent reasoner that this experiment trains "
            f"({', '.join(folders) or 'there is none'})."
        )
    return model, folders[model]


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
    stores = [stage.reads for stage in STAGES.values() if stage.reads is not None]
    meanings = {**MEANINGS, **{s.name: s.meaning for s in stores}, **{n: stage.meaning for n, stage in STAGES.items()}}
    lines = [f"# {config.name}: {len(chosen)} steps in {config.directory}, run one by one or with `| bash -e`"]
    for number, name in enumerate(chosen, start=1):
        lines += ["", f"# {number}. {name}: {meanings[name]} [{_status(config, name)}]"]
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
    stores = {s.reads.name: [run / s.reads.folder] for s in STAGES.values() if s.reads is not None}
    splits = [split for split in config.eval.splits if split != "test" or config.data.test]
    evaluations = [run / "eval" / model / split for model in models_of(config) for split in splits]
    folders = {**stores, "eval": evaluations}.get(name, [run / name])
    manifests = [Step(directory=folder, inputs={}).manifest() for folder in folders]
    if all(found is not None and found["status"] == FINISHED for found in manifests):
        return "finished"
    return "begun, not finished" if any(manifests) else "to do"
