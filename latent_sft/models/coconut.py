"""Coconut: CoT steps give way to hidden states fed back as inputs, stage by stage (arXiv 2412.06769)."""

from __future__ import annotations

from torch import Tensor, nn

from latent_sft.method.types import LatentSpec
from latent_sft.models.head import ce_total
from latent_sft.models.thought_passes import check_length, labelled, read, read_on, think_in_turn, use_thoughts
from latent_sft.models.thoughts import Thoughts


class CoconutModel(nn.Module):
    """A causal LM with cross-entropy on the written steps, `</think>` and the answer after latents.

    Args:
        lm: causal LM; its attention is set to ours.
        thoughts: from a hidden state to the next input; Coconut's is the identity.
        spec: settings.
    """

    def __init__(self, lm: nn.Module, thoughts: Thoughts, spec: LatentSpec) -> None:
        super().__init__()
        self.lm, self.thoughts, self.spec = lm, thoughts, spec
        use_thoughts(lm)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return `ce_total`, the weighted sum over a batch of `data.thought_batches.coconut_batch`."""
        check_length(self.lm, batch["kind"].shape[1])
        prompt = read(self.lm, batch["prompt_ids"], batch["prompt_length"])
        thought = think_in_turn(self.lm, self.thoughts, prompt, batch["thought_mask"])
        result = read_on(
            self.lm, batch["tail_ids"], batch["tail_length"], thought.position, (prompt.piece, *thought.pieces)
        )
        hidden = labelled(thought.last, result, batch["target_index"])
        return {"ce_total": ce_total(self.lm, hidden, batch["targets"], batch["target_weights"])}
