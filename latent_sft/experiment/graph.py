"""The steps of an experiment as a graph, each in its place, and the graph as the shell commands it consists of.

    base -> data -> stages, and the stores they read -> eval of every model -> report
                                                                           -> export

`run.py` walks it, `plan` shows it, `compare.py` puts the graphs of several experiments together.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latent_sft.config.experiment import Config
from latent_sft.errors import STOPPED, ConfigError, Interrupted, TrainingError
from latent_sft.evaluation.report import write_report
from latent_sft.evaluation.results import Job
from latent_sft.evaluation.run import decided_by, evaluate, problems_of
from latent_sft.experiment.stores import store_latents
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.launcher import build_command, start
from latent_sft.methods import STAGES
from latent_sft.runs import FINISHED, Step, exclusive, fingerprint
from latent_sft.train.run import train_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A step in its place.

    Attributes:
        name: of the stage or store, `eval <model>`, and so on.
        meaning: one line for `plan`.
        folder: below the run directory.
        parts: folders below it that hold a manifest; empty where there is none.
        needs: names of the nodes that come first.
        command: words that make it alone; empty where every command makes it that needs it.
        inputs: -> everything that decides its result: equal where it is made alike; None where it is always made anew.
        make: opened experiment -> makes it, or returns at once where it is finished.
    """

    name: str
    meaning: str
    folder: str
    parts: tuple[str, ...] = ("",)
    needs: tuple[str, ...]
    command: tuple[str, ...]
    inputs: Callable[[], Any] | None = None
    make: Callable[[Workspace], Any]

    def status(self, directory: Path) -> str:
        """Return whether it is finished, begun or to do, as its manifests say; whether they fit is seen on running."""
        folder = directory / self.folder
        if not self.parts:
            return "finished" if any(folder.glob("[!.]*")) else "to do"
        manifests = [Step(directory=folder / part, inputs={}).manifest() for part in self.parts]
        if all(found is not None and found["status"] == FINISHED for found in manifests):
            return "finished"
        return "begun, not finished" if any(manifests) else "to do"


def graph_of(experiment: Experiment) -> dict[str, Node]:
    """Return the nodes of an experiment by name; each needs earlier ones only.

    Args:
        experiment: opened, or as its configuration tells; `inputs` are of the same kind.

    Raises:
        ConfigError: no stage is enabled.
    """
    config, nodes = experiment.config, dict[str, Node]()

    def add(name: str, *needs: str | None, meaning: str, **more: Any) -> None:
        earlier = tuple(n for n in needs if n in nodes)  # what is not trained here has to be there already
        nodes[name] = Node(name=name, needs=earlier, meaning=meaning, **{"folder": name, "command": (name,), **more})

    if not config.model.name_or_path:
        # opening an experiment makes it
        meaning = "tokenizer and initial weights of a tiny model"
        add("base", meaning=meaning, command=(), inputs=lambda: experiment.of_base, make=lambda work: None)
    add("data", "base", meaning="tokenised splits", parts=(), command=(), inputs=experiment.of_rows, make=_tokenise)
    for name, stage in STAGES.items():
        if not config.stage(name).enabled:
            continue
        store, needs = stage.reads, ["data", experiment.source_name(name)]
        if store is not None and store.name:
            source, inputs = experiment.store_source_name(store), partial(_inputs, experiment.store_step, store)
            make = partial(store_latents, name=name)
            add(store.name, "data", source, meaning=store.meaning, folder=store.folder, inputs=inputs, make=make)
            needs.append(store.name)
        inputs = partial(_inputs, experiment.step, name)
        add(name, *needs, meaning=stage.meaning, command=("train", name), inputs=inputs, make=partial(train, name))
    if not set(nodes) & set(STAGES):
        raise ConfigError("no stage is enabled; expected one to be named, for example cot: {} in the file, or cot={}.")
    splits = tuple(split for split in config.eval.splits if split != "test" or config.data.test)
    for name, stages in config.models().items():
        known = {"parts": (*splits, *config.sets()), "folder": f"eval/{name}", "command": ("eval", "--model", name)}
        known |= {"inputs": partial(_inputs_of_eval, experiment, name), "make": partial(_evaluate, name)}
        add(f"eval {name}", "data", stages[-1], meaning=f"accuracy and reasoning length of {name}", **known)
    meaning = "tables and plots of the whole experiment"
    add("report", *(f"eval {name}" for name in config.models()), meaning=meaning, parts=(), make=_report)
    for name, folder in config.exports().items():
        known = {"parts": (), "command": ("export", "--model", name), "make": partial(_export, name, folder)}
        add(folder, config.models()[name][-1], f"eval {name}", meaning=f"a Hugging Face folder of {name}", **known)
    return nodes


def together(jobs: Iterable[Job]) -> dict[str, list[tuple[Job, Node]]]:
    """Return the graph of several experiments: by fingerprint who wants a node; what is equal is one node.

    Experiments are taken as their configurations tell, so nothing is opened; what is always made anew is left out.
    """
    found: dict[str, list[tuple[Job, Node]]] = {}
    for job in jobs:
        for node in graph_of(Experiment(job.config)).values():
            if node.inputs is not None:
                found.setdefault(fingerprint(node.name, node.inputs()), []).append((job, node))
    return found


def dependents(nodes: Mapping[str, Node], name: str) -> list[str]:
    """Return the nodes that cannot be made without one, directly or by others."""
    found = [name]
    for node in nodes.values():
        if set(node.needs) & set(found):
            found.append(node.name)
    return found[1:]


def plan(config: Config, config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a shell script: one comment and one command a step; what is finished is skipped when it is run.

    Args:
        config: the resolved experiment.
        config_path: the file the commands name.
        overrides: `key=value` settings every command repeats.
    """
    nodes = graph_of(Experiment(config))
    lines = [f"# {config.name}: {len(nodes)} steps in {config.directory}, run one by one or with `| bash -e`"]
    for number, node in enumerate(nodes.values(), start=1):
        lines += ["", f"# {number}. {node.name}: {node.meaning} [{node.status(Path(config.directory))}]"]
        if node.name in STAGES and config.launch.nproc > 1:
            lines.append(f"# starts {config.launch.nproc} processes with torchrun (launch.nproc)")
        verb = ["latent-sft", *node.command, str(config_path), *overrides]
        lines.append(shlex.join(verb) if node.command else "# made by the first command that needs it")
    return "\n".join(lines) + "\n"


def plan_comparison(config: Config, jobs: Sequence[Job], config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a shell script with the command of a comparison, and a comment for each of its runs and their steps.

    Args:
        config: the comparison.
        jobs: its runs, see `compare.jobs_of`.
        config_path: the file the command names.
        overrides: `key=value` settings it repeats.
    """
    first = {(job.name, node.name): places[0][0] for places in together(jobs).values() for job, node in places}
    lines = [f"# {config.name}: {len(jobs)} runs below {config.directory}, {config.compare.jobs} at once"]
    for number, job in enumerate(jobs, start=1):
        begun = "begun, not finished" if (job.directory / "config.yaml").exists() else "to do"
        lines.append(f"# {number}. {job.name} [{'finished' if job.is_finished() else begun}]")
        for node in graph_of(Experiment(job.config)).values():
            owner = first.get((job.name, node.name), job)
            shown = f"[{node.status(job.directory)}]" if owner is job else f"as in {owner.name}"
            lines.append(f"#      {node.name} {shown}")
    lines += ["", shlex.join(["latent-sft", "run", str(config_path), *overrides])]
    return "\n".join(lines) + "\n"


def train(name: str, work: Workspace) -> None:
    """Train a stage, on several processes where the configuration asks for them.

    Raises:
        Interrupted: they were told to stop.
        TrainingError: they failed.
    """
    config = work.config
    if config.launch.alone or work.step(name).is_finished():
        with exclusive(work.directory / name):
            train_stage(config, name, work)
        return
    status = start(build_command(name, work.directory / "config.yaml", [], config.launch))
    if status == STOPPED:
        raise Interrupted(f"{name}: stopped as told")
    if status != 0:
        raise TrainingError(f"{name}: {config.launch.nproc} processes ended with status {status}; see above.")


def _inputs(step: Callable[[Any], Step], of: Any) -> Any:
    return step(of).inputs


def _inputs_of_eval(experiment: Experiment, name: str) -> Any:
    sets = [[sorted(experiment.config.eval.sets)]] if experiment.config.eval.sets else []
    return experiment.step(experiment.config.models()[name][-1]).inputs, decided_by(experiment, name), *sets


def _tokenise(work: Workspace) -> None:
    for split in work.data:
        _ = work.data[split]  # a bad row of the test set must not show after the training
    for name in work.config.sets():
        problems_of(work, name)


def _evaluate(name: str, work: Workspace) -> None:
    evaluate(work.config, [name], work=work)


def _report(work: Workspace) -> None:
    write_report(work.directory, title=work.config.name)


def _export(name: str, folder: str, work: Workspace) -> None:
    export_run(work.config, name, work.directory / folder)
