"""From hidden states to logits and losses: the LM head of any Hugging Face causal decoder.

No family names: the three scalars that some families put between hidden states and logits are read from their
configuration, and `check_head` compares with the model's own logits. Training calls `ce_total` and `kl_total`, which
take a chunk of logits at a time (`latent_sft.method.losses`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from latent_sft.errors import ConfigError
from latent_sft.method.losses import LinearHead, chunk_rows, linear_nll, mapped_nll
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.models.backbone import embed, hidden_states, unwrap_peft
from latent_sft.models.logits import head, head_scalars
from latent_sft.models.sharding import call_with, gathered_parameters, is_partitioned, replaced_forward


def ce_total(model: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weighted cross-entropies, as `weighted_cross_entropy` of the logits, in nats.

    Args:
        model: causal LM, possibly wrapped by PEFT.
        hidden: `[M, D]` last hidden states of the labelled positions; M may be 0.
        targets: `[M]` token ids.
        weights: `[M]`.
    """
    return head_nll(model, hidden, targets[:, None], torch.ones_like(weights)[:, None], weights)


def kl_total(model: nn.Module, hidden: Tensor, teacher: Superposition, weights: Tensor) -> Tensor:
    """Return the sum of weighted KL divergences, as `weighted_sparse_kl` of the logits, in nats.

    Args:
        model: causal LM, possibly wrapped by PEFT.
        hidden: `[M, D]` last hidden states, one position before each latent; M may be 0.
        teacher: ids and weights `[M, K]`.
        weights: `[M]`.
    """
    nll = head_nll(model, hidden, teacher.ids, teacher.weights, weights)
    nats = entropy(Superposition(teacher.ids, teacher.weights.to(nll.dtype)))
    return nll - (nats * weights.to(nll.dtype)).sum()


def head_nll(model: nn.Module, hidden: Tensor, ids: Tensor, alpha: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_m w_m sum_k alpha_mk (logsumexp(logits_m) - logits_m[id_mk])` through the model's own head.

    Args:
        model: causal LM, possibly wrapped by PEFT.
        hidden: `[M, D]` last hidden states; M may be 0.
        ids: `[M, K]` token ids.
        alpha: `[M, K]` weights of the ids, no gradient.
        weights: `[M]` weights of the positions, no gradient.

    Returns:
        Scalar, nats, float32 (float64 stays).
    """
    output = unwrap_peft(model).get_output_embeddings()
    scale, cap = head_scalars(model)

    def fused(hidden: Tensor) -> Tensor:
        return linear_nll(hidden, LinearHead(output.weight, output.bias, scale, cap), ids, alpha, weights)

    # DeepSpeed ZeRO-3 leaves parameters empty and fills them by hooks around a module's call
    partitioned = is_partitioned(output.parameters())
    plain = type(output) is nn.Linear and type(output.weight) is nn.Parameter and "forward" not in vars(output)
    if plain and partitioned:
        return call_with(output, fused, hidden)
    if plain and not output._forward_hooks and not output._forward_pre_hooks:
        return fused(hidden)
    # every call of a partitioned head is a collective, and all processes must make the same number of them: one
    vocab_size = unwrap_peft(model).config.get_text_config().vocab_size
    chunk = len(hidden) if partitioned else chunk_rows(vocab_size, hidden.device)
    return mapped_nll(hidden, head(model), ids, alpha, weights, chunk)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare our logits with the model's own on three tokens.

    Raises:
        ConfigError: they differ; the family does something between hidden states and logits that is not known here.
    """
    lm = unwrap_peft(model)
    was_training = lm.training
    lm.eval()
    output = lm.get_output_embeddings()
    weight = output.weight
    ids = torch.arange(3, device=weight.device)[None] % lm.config.get_text_config().vocab_size
    with gathered_parameters(output.parameters()):
        if is_partitioned(lm.parameters()):  # the layers are spread over the processes: their output is made up
            hidden = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(1, 3, -1)
            made_up = BaseModelOutputWithPast(last_hidden_state=hidden)
            with replaced_forward(lm.get_decoder(), lambda *args, **kwargs: made_up):
                own = lm(input_ids=ids, use_cache=False).logits
        else:
            own = lm(input_ids=ids, use_cache=False).logits
            hidden = hidden_states(lm, embed(lm, ids))
        ours = head(lm)(hidden)
    lm.train(was_training)
    scale = own.abs().max().clamp(min=1.0)
    if (own - ours).abs().max() > 1e-2 * scale:
        raise ConfigError(
            f"model: {type(lm).__name__} computes its logits in a way this version does not know (difference "
            f"{(own - ours).abs().max().item():.3g}). Please report the model type {lm.config.model_type!r}."
        )
