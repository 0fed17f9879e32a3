"""Stage 2: the LLM learns to produce the stored latents by itself, and then the answer (docs/internals/method.md)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_sft.method.layout import Kind
from latent_sft.method.losses import StepOutput
from latent_sft.method.superposition import with_noise
from latent_sft.method.types import LatentSpec, SpanCode, Superposition
from latent_sft.models.backbone import embed, hidden_states, mix_latents
from latent_sft.models.head import ce_total, kl_total


class Stage2Model(nn.Module):
    """A causal LM with the stage-2 objective; the noisy labels are both KL target and input mixture.

    Where a batch has `fed_ids` and `fed_weights` `[B, N, K']`, these are the input mixture, and the
    labels are the target alone.
    """

    train_table = False  # whether embeddings learn from being mixed

    def __init__(self, lm: nn.Module, spec: LatentSpec) -> None:
        super().__init__()
        self.lm = lm
        self.spec = spec
        self.code: SpanCode | None = None  # where labels are code words of spans: how such latents are read

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce` and `kl`, weighted sums; see `latent_sft.data.collate.stage2_batch`."""
        latent = Superposition(batch["latent_ids"], batch["latent_weights"])
        latent = with_noise(latent, self.spec, self.spec.noise_scale if self.training else 0.0)
        fed = Superposition(batch["fed_ids"], batch["fed_weights"]) if "fed_ids" in batch else latent
        hidden = self.states(batch, fed)
        ce = ce_total(self.lm, hidden[batch["target_index"]], batch["targets"], batch["target_weights"])
        teacher = Superposition(*(part.flatten(0, 1)[batch["kl_latent"]] for part in latent))
        kl = kl_total(self.lm, hidden[batch["kl_index"]], teacher, batch["kl_weights"])
        return StepOutput({"ce": ce, "kl": kl}, {})

    def states(self, batch: dict[str, Tensor], fed: Superposition) -> Tensor:
        """Return the last hidden states `[B T, D]` where these latents `[B, N, K]` are fed."""
        embeds = embed(self.lm, batch["ids"])
        slot = batch["branch"].clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1])
        placed = mix_latents(self.lm, fed, self.train_table).to(embeds.dtype).gather(1, slot)
        embeds = torch.where((batch["kind"] == Kind.LATENT)[..., None], placed, embeds)
        return hidden_states(self.lm, embeds).flatten(0, 1)
