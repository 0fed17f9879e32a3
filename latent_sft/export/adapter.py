"""The adapters of a latent reasoner alone: a PEFT folder with the spec, for those who have its base model."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME

from latent_sft.config.experiment import Config
from latent_sft.errors import ArtefactError, ConfigError, ExportError
from latent_sft.experiment.workspace import Workspace
from latent_sft.method.types import SPEC_FILE, THINKER_FILE
from latent_sft.methods import MODELS, STAGES
from latent_sft.models.thoughts import THOUGHTS_FILE
from latent_sft.train.interruption import last_checkpoint

ADAPTER_FILE = "adapter_config.json"


def export_adapter(config: Config, model: str, out: Path) -> Path:
    """Write the adapters of the best checkpoint, as PEFT and `latent_sft.load` read them.

    `adapter_config.json` names the base: what the last stage of the model started from.

    Args:
        config: the experiment; the model must be trained, with adapters.
        model: one of `methods.MODELS` that is exported.
        out: folder to write; an earlier export of adapters there is replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: the experiment trains no adapters.
        ArtefactError: its last stage is not finished, or kept no checkpoint.
        ExportError: `out` holds something else.
    """
    if config.model.lora.rank == 0:
        raise ConfigError("model.lora.rank: got 0, expected adapters (a rank >= 1) for --adapter.")
    if out.exists() and not (out / ADAPTER_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: is there already and holds no adapters; give another folder or empty that one.")
    work, name = Workspace(config), MODELS[model].stages[-1]
    step, stage, setup = work.step(name), STAGES[name], work.setup(name)
    best = step.directory / f"checkpoint-{step.results()['best_step']}"
    checkpoint = best if best.is_dir() else last_checkpoint(step.directory)
    if checkpoint is None:
        raise ArtefactError(
            f"{step.directory}: no checkpoint was kept, and `final` holds adapters only as part of the model "
            f"({stage.section}.keep_checkpoint=false). Export the model without --adapter."
        )
    module = stage.model(setup)
    module.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME), strict=False)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    module.lm.peft_config["default"].base_model_name_or_path = str(setup.single)
    module.lm.save_pretrained(part)
    setup.tokenizer.save_pretrained(part)
    for file in ("config.json", SPEC_FILE, THINKER_FILE, THOUGHTS_FILE):
        if (step.final / file).is_file():
            shutil.copyfile(step.final / file, part / file)
    if out.exists():
        shutil.rmtree(out)
    part.replace(out)
    return out
