"""The `label` step: the encoder's latents of every training row, the soft labels of stage 2."""

from __future__ import annotations

from latent_sft.config.schema import Config
from latent_sft.inference.encode import store_latents
from latent_sft.runs import Step
from latent_sft.workspace import Workspace


def make_labels(config: Config, work: Workspace | None = None) -> Step:
    """Store the labels, or return at once where they are finished; see `latent_sft.inference.encode.store_latents`.

    Raises:
        ArtefactError: stage 1 is not finished, or the store belongs to another experiment.
    """
    return store_latents(work or Workspace(config), "label")
