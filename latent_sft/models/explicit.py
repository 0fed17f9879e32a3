"""Explicit CoT fine-tuning and No-CoT: the baselines, trained through the same path."""

from __future__ import annotations

from torch import Tensor, nn

from latent_sft.models.backbone import embed, hidden_states
from latent_sft.models.head import ce_total


class ExplicitModel(nn.Module):
    """A causal LM with cross-entropy on CoT, `</think>` and answer; see `latent_sft.data.collate.explicit_batch`."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return `ce_total`, the weighted sum over labelled positions."""
        hidden = hidden_states(self.lm, embed(self.lm, batch["ids"])).flatten(0, 1)
        labelled = hidden[batch["target_index"]]
        return {"ce_total": ce_total(self.lm, labelled, batch["targets"], batch["target_weights"])}
