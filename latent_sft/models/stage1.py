"""Stage 1: Latent Token Encoder and decoder as one module (paper section 3; reference sections 1.2-1.6).

The encoder reads prompt and CoT under the induction mask; its hidden states at the markers become superpositions; the
decoder must recover chunks, `</think>` and answer from them under the supervision mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_sft.data.collate import Batch
from latent_sft.method.layout import Kind
from latent_sft.method.losses import weighted_cross_entropy
from latent_sft.method.masks import induction_mask, supervision_mask
from latent_sft.method.superposition import superpose, with_noise
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import embed, head, head_table, hidden_states, input_table, mix_latents


class Stage1Model(nn.Module):
    """Encoder, marker embedding and decoder.

    The marker is one trained vector, not a new row of the table, so neither vocabulary is resized.

    Args:
        encoder: causal LM whose head is not used.
        decoder: causal LM of the same hidden size and vocabulary.
        marker: `[D]` initial marker embedding.
        spec: settings.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, marker: Tensor, spec: LatentSpec) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.marker = nn.Parameter(marker.clone())
        self.spec = spec
        self.noise_scale = 0.0  # raised while training, by a callback

    def encode(self, batch: Batch) -> Superposition:
        """Return the latents `[B, N, K]` of a batch made by `encoder_batch` (padded slots hold arbitrary values)."""
        kind = batch["encoder_kind"]
        is_marker = (kind == Kind.MARKER)[..., None]
        embeds = embed(self.encoder, batch["encoder_ids"])
        marker = self.marker.to(embeds.dtype)
        if self.spec.marker_input == "previous":
            marker = embeds.roll(1, dims=1) + marker  # a marker stands right behind its segment's last token
        embeds = torch.where(is_marker, marker, embeds)
        hidden = hidden_states(self.encoder, embeds, induction_mask(kind), batch["encoder_position"])
        index = batch["marker_index"][..., None].expand(-1, -1, hidden.shape[-1])
        at_markers = hidden.gather(1, index)
        exclude = self.spec.end_think_ids[0] if self.spec.exclude_end else None
        return superpose(self.project(at_markers), self.spec.top_k, self.spec.temperature, exclude)

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits `[..., V]` of marker states over the decoder's table, which is not trained through them."""
        if self.spec.projection == "input":
            return nn.functional.linear(hidden, input_table(self.decoder).detach())
        return nn.functional.linear(hidden, head_table(self.decoder).detach())

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return the sum of the weighted cross-entropy and what describes the latents.

        Returns:
            `ce_total` scalar; `latent_weights`, `latent_ids` `[B, N, K]` detached, for the logs.
        """
        latent = with_noise(self.encode(batch), self.spec, self.noise_scale if self.training else 0.0)
        embeds = embed(self.decoder, batch["ids"])
        # every latent position looks up its own latent by branch number: no loop, no device sync
        slot = batch["branch"].clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1])
        placed = mix_latents(self.decoder, latent).to(embeds.dtype).gather(1, slot)
        embeds = torch.where((batch["kind"] == Kind.LATENT)[..., None], placed, embeds)
        keep = supervision_mask(batch["kind"], batch["branch"])
        hidden = hidden_states(self.decoder, embeds, keep, batch["position"])
        labelled = hidden.flatten(0, 1)[batch["target_index"]]
        ce = weighted_cross_entropy(head(self.decoder)(labelled), batch["targets"], batch["target_weights"])
        return {"ce_total": ce, "latent_ids": latent.ids.detach(), "latent_weights": latent.weights.detach()}
