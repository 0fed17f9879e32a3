"""Stage 1: Latent Token Encoder and decoder as one module (arXiv 2510.15522 section 3; docs/internals/method.md).

The encoder reads prompt and CoT under the induction mask; its hidden states at the markers become superpositions; the
decoder must recover chunks, `</think>` and answer from them under the supervision mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latent_sft.data.collate import Batch
from latent_sft.method.layout import Kind
from latent_sft.method.losses import LinearHead, StepOutput, linear_nll
from latent_sft.method.projection import superpose_states
from latent_sft.method.superposition import entropy, with_noise
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.attention import decoder_states, encoder_states, use_backend
from latent_sft.models.backbone import embed, mix_latents, unwrap_peft
from latent_sft.models.head import ce_total
from latent_sft.models.sharding import call_with, is_partitioned


class Stage1Model(nn.Module):
    """Encoder, marker embedding and decoder.

    The marker is one trained vector, not a new row of the table, so neither vocabulary is resized.

    Args:
        encoder: causal LM whose head is not used.
        decoder: causal LM of the same hidden size and vocabulary.
        marker: `[D]` initial marker embedding.
        spec: settings.
        attention: backend of `latent_sft.models.attention`.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, marker: Tensor, spec: LatentSpec, attention: str = "auto"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.marker = nn.Parameter(marker.clone())
        self.spec = spec
        self.encoder_attention = use_backend(encoder, attention)
        self.decoder_attention = use_backend(decoder, attention)
        self.noise_scale = 0.0  # raised while training, by a callback
        self.span_share = 1.0  # of the weight of the span term, lowered by another
        self.filler = False  # whether a latent of the prompt alone stands in front

    def encode(self, batch: Batch) -> Superposition:
        """Return the latents `[B, N, K]` of a batch made by `encoder_batch` (padded slots hold arbitrary values)."""
        return self._superpose(self._marker_states(batch))

    def _marker_states(self, batch: Batch) -> Tensor:
        part = {k.removeprefix("encoder_"): v for k, v in batch.items() if k.startswith("encoder_")}
        anchor = part["anchor"]
        num_text = part["ids"].shape[1] - anchor.shape[1]
        text = embed(self.encoder, part["ids"][:, :num_text])
        markers = self.marker.to(text.dtype).expand(*anchor.shape[:2], -1)
        if self.spec.marker_input == "previous":
            markers = markers + text.gather(1, anchor.expand(-1, -1, text.shape[-1]))
        span = num_text if self.spec.marker_positions == "transparent" else part["ids"].shape[1]
        embeds = torch.cat([text, markers], dim=1)
        hidden = encoder_states(self.encoder, self.encoder_attention, embeds, part, span)
        # a half that is trained as a whole is float32 beside a frozen one
        return hidden[:, num_text:].to(self._projection.weight.dtype)

    @property
    def _projection(self) -> Any:
        decoder = unwrap_peft(self.decoder)
        by_input = self.spec.projection == "input"
        return decoder.get_input_embeddings() if by_input else decoder.get_output_embeddings()

    def _superpose(self, hidden: Tensor) -> Superposition:
        exclude = self.spec.end_think_ids[0] if self.spec.exclude_end else None
        module = self._projection
        if not is_partitioned(module.parameters()):
            return superpose_states(hidden, module.weight, self.spec.top_k, self.spec.temperature, exclude)
        ids: Tensor | None = None

        def project(hidden: Tensor) -> Tensor:  # a single tensor: other hooks expect embeddings
            nonlocal ids
            ids, weights = superpose_states(hidden, module.weight, self.spec.top_k, self.spec.temperature, exclude)
            return weights

        # a table partitioned by ZeRO-3 is there only while its module is called
        weights = call_with(module, project, hidden)
        assert ids is not None
        return Superposition(ids, weights)

    def _span_total(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the weighted sum of KL(code word || softmax over the vocabulary) at the markers `[B, N, D]`."""
        words, weights = Superposition(batch["span_ids"], batch["span_masses"]), batch["span_weights"]
        module = self._projection

        def nll(hidden: Tensor) -> Tensor:  # the table is not trained through latents
            table = LinearHead(module.weight.detach(), scale=1 / self.spec.temperature)
            return linear_nll(hidden, table, words.ids, words.weights, weights)

        hidden = hidden.flatten(0, 1)[batch["span_index"]]
        total = call_with(module, nll, hidden) if is_partitioned(module.parameters()) else nll(hidden)
        return total - (entropy(words) * weights).sum()

    def forward(self, **batch: Tensor) -> StepOutput:
        """Return `ce`, the weighted sum, and where the batch has code words `span`, times the share that is left of it.

        Observed are the latents: entropy, share with `</think>` as top-1, and KL from their code words.
        """
        losses, seen = {}, {}
        if "latent_ids" in batch:  # those of a frozen encoder, computed once
            latent = Superposition(batch["latent_ids"], batch["latent_weights"])
        else:
            markers = self._marker_states(batch)
            latent = self._superpose(markers)
            if "span_ids" in batch:
                span = self._span_total(markers, batch)
                losses["span"] = self.span_share * span
                seen["span_kl"] = (span.detach(), batch["span_weights"].sum())
        latent = with_noise(latent, self.spec, self.noise_scale if self.training else 0.0)
        embeds = embed(self.decoder, batch["ids"])
        # every latent position looks up its own latent by branch number: no loop, no device sync
        slot = batch["branch"].clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1])
        placed = mix_latents(self.decoder, latent).to(embeds.dtype).gather(1, slot)
        embeds = torch.where((batch["kind"] == Kind.LATENT)[..., None], placed, embeds)
        hidden = decoder_states(self.decoder, self.decoder_attention, embeds, batch)
        labelled = hidden.flatten(0, 1)[batch["target_index"]]
        ce = ce_total(self.decoder, labelled, batch["targets"], batch["target_weights"])
        real = batch["latent_mask"]
        told = {
            "latent_entropy": entropy(Superposition(latent.ids, latent.weights.detach())),
            "end_token_rate": latent.ids[..., 0] == self.spec.end_think_ids[0],
        }
        seen |= {name: ((value * real).sum(), real.sum()) for name, value in told.items()}
        return StepOutput({"ce": ce, **losses}, seen)
