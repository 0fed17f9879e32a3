"""How long a stage trains, and what is left of it: prolonged, ended early, its final folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME

from latent_sft.errors import ArtefactError
from latent_sft.methods.base import Setup, Stage, TrainState
from latent_sft.runs import FINISHED, Step
from latent_sft.train.interruption import last_checkpoint, rotate, state_of
from latent_sft.train.sampler import StepSampler

log = logging.getLogger(__name__)


def departures(step: Step, checkpoint: str | None, section: str, ends: bool = False) -> list[dict[str, Any]]:
    """Return where training departed from its plan: the steps done, of how many, and the fingerprint until then.

    That is at this checkpoint where the stage is to train longer from now on, or to end (`ends`).
    """
    found = step.manifest()
    if found is None or checkpoint is None:
        if found is not None and found["status"] == FINISHED:
            raise ArtefactError(
                f"{step.directory}: finished after {found['steps']} steps, and no checkpoint was kept to go on from "
                f"({section}.keep_checkpoint). Train it anew in another run_dir, or start "
                f"there from its weights with {section}.start_from={step.final}."
            )
        return []
    history = found.get("history", [])
    state = state_of(checkpoint)
    here = {"step": state.global_step, "of": state.max_steps, "fingerprint": found["fingerprint"]}
    departs = ends or found["fingerprint"] != step.fingerprint
    return [*history, here] if departs and history[-1:] != [here] else history


def check_length(step: Step, state: TrainState, total: int, section: str) -> None:
    """Say what a stage does that is to train longer, or refuse one that has trained longer than asked for."""
    if state.global_step > total:
        raise ArtefactError(
            f"{step.directory}: trained for {state.global_step} steps already, more than the {total} of "
            f"{section}.max_steps or {section}.epochs. Restore the settings, use another run_dir, or keep an "
            f"unfinished stage as it is with `latent-sft finish {step.directory.name}`."
        )
    if state.max_steps != total:
        log.info(
            "%s: continues from step %d of %d, now to step %d; the learning rate, and whatever else follows the share "
            "of steps done, is that of the new number",
            step.directory.name, state.global_step, state.max_steps, total,
        )  # fmt: skip


def write_final(
    state: TrainState, sampler: StepSampler, stage: Stage, setup: Setup, step: Step, train_rows: int, **results: Any
) -> None:
    """Write the final folder: what the stage started from, with the trained parameters of the best checkpoint.

    So it does not matter how the trained model is spread over processes and devices.
    """
    newest = Path(str(last_checkpoint(step.directory)))
    best = step.directory / f"checkpoint-{state.best_global_step}"
    model = stage.model(setup)
    model.load_state_dict(load_file((best if best.is_dir() else newest) / SAFE_WEIGHTS_NAME), strict=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    stage.save(model, setup, step.final)
    step.finish(
        train_seconds=round(state.seconds, 1),
        train_rows=train_rows,
        steps=state.global_step,
        examples_seen=sampler.examples_until(state.global_step),
        parameters=parameters,
        trained_parameters=trained,
        validation_accuracy=state.best_metric,
        best_step=state.best_global_step,
        **results,
    )
    # the best one is in final/ now, but a prolonged stage may find no better one
    needed = (
        {int(newest.name.removeprefix("checkpoint-")), state.best_global_step} if setup.train.keep_checkpoint else set()
    )
    rotate(step.directory, 0, needed)
    best = "none" if state.best_metric is None else f"{state.best_metric:.1%}"
    log.info("%s: validation accuracy %s, %.0f s, saved in %s", step.directory.name, best, state.seconds, step.final)
