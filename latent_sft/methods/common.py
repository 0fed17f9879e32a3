"""What the methods that think in hidden states share: batches cut where the passes are, where latents start, saving.

A row is cut into prompt, latents (whose inputs only the model knows), and what is read after them. Each part is padded
on its own, on the right. `target_index` counts in `[B, 1 + S]`: column 0 stands for the state right before a part (of
the last latent or prompt token), the others for the part's own tokens.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_sft.config.schema import LatentConfig
from latent_sft.data.collate import Batch, TokenRow
from latent_sft.data.lengths import Number
from latent_sft.errors import ConfigError, DataError
from latent_sft.inference.solve import Thinker
from latent_sft.method.layout import IGNORE, Kind, Row
from latent_sft.method.types import LatentSpec
from latent_sft.methods.base import Setup
from latent_sft.models.backbone import embed, unwrap_peft
from latent_sft.models.load import merged, save_lm, save_thinker
from latent_sft.models.sharding import gathered_parameters
from latent_sft.models.thoughts import THOUGHTS_FILE, Thoughts, save_thoughts


def own_settings(settings: Any, latent: LatentConfig) -> dict[str, Any]:
    """Return a method's settings but those of its training, which every stage has."""
    return {"method": {k: v for k, v in dataclasses.asdict(settings).items() if k != "train"}}


def start_of(lm: nn.Module, spec: LatentSpec) -> Tensor:
    """Return the `[D]` embedding that placeholders of latents start from, that of `<think>`."""
    table = unwrap_peft(lm).get_input_embeddings()
    with gathered_parameters(table.parameters()):
        return embed(lm, torch.tensor(spec.think_ids[-1], device=table.weight.device))


def take_given(thoughts: Thoughts, setup: Setup) -> None:
    """Go on with what is between the thoughts of a stage of this kind that `start_from` names.

    Raises:
        ConfigError: its projection is not the one configured here.
    """
    path = Path(setup.single) / THOUGHTS_FILE
    if not setup.train.start_from or not path.exists():
        return
    try:
        thoughts.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ConfigError(
            f"start_from={setup.train.start_from}: {path} does not fit the stage as it is configured here (projection)."
        ) from error


def thinker_of(model: Any) -> Thinker:
    """Return how a module with `lm` and `thoughts` thinks; without any latents it writes."""
    if not model.thoughts.spec.num_latents:
        return Thinker("explicit", model.lm)
    return Thinker("continuous", model.lm, model.thoughts)


def save_with_thoughts(model: Any, setup: Setup, folder: Path) -> None:
    """Write the model, what is between its thoughts, and how it thinks."""
    save_lm(merged(model.lm), folder, setup.tokenizer)
    save_thoughts(model.thoughts, folder)
    spec = model.thoughts.spec
    if spec.num_latents:
        save_thinker(folder, setup.spec, "continuous", spec)
    else:
        save_thinker(folder, setup.spec, "explicit")


def drawn_anew(rows: int, total_steps: int, seed: int) -> Number:
    """Return the function (optimizer step, row) -> number of the example; its phase is the seed of what is drawn."""
    return lambda step, row: random.Random(f"{seed}/{step}/{row}").getrandbits(24) * rows + row


def step_lengths(row: TokenRow) -> list[int]:
    """Return the tokens of each step of the CoT; none for an empty CoT.

    Raises:
        DataError: the row does not say where its steps end.
    """
    lengths = list(row["step_lengths"])
    if sum(lengths) != len(row["cot"]):
        raise DataError(
            f"row {row['id']}: its steps are not parts of its CoT, so none can be left out or become latents. Give the "
            "CoT as a list of steps (data.fields.steps), or set drop_last_step=false where a method has it."
        )
    return lengths


def padded(name: str, lists: list[list[int]], pad_id: int) -> Batch:
    """Return `<name>_ids` `[B, S]` padded to the longest, and `<name>_length` `[B]`."""
    longest = max(map(len, lists))
    return {
        f"{name}_ids": torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in lists]),
        f"{name}_length": torch.tensor([len(ids) for ids in lists]),
    }


def kind_of(batch: Batch, name: str) -> Tensor:
    """Return what the columns of a part hold, `[B, S]`."""
    ids, length = batch[f"{name}_ids"], batch[f"{name}_length"]
    kind = Kind.TEXT if name == "prompt" else Kind.TAIL
    return (torch.arange(ids.shape[1]) < length[:, None]) * int(kind)


def targets_of(prefix: str, rows: list[Row], starts: list[int], width: int) -> Batch:
    """Return the labelled positions of a part that begins at `starts` and is `width` columns wide."""
    index, targets, weights = [], [], []
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for column, t in enumerate(range(start - 1, len(row.ids))):
            if row.target[t] != IGNORE:
                index.append(b * (1 + width) + column)
                targets.append(row.target[t])
                weights.append(row.weight[t])
    return {
        f"{prefix}target_index": torch.tensor(index, dtype=torch.long),
        f"{prefix}targets": torch.tensor(targets, dtype=torch.long),
        f"{prefix}target_weights": torch.tensor(weights, dtype=torch.float32),
    }
