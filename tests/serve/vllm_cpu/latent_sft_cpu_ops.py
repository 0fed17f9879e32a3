"""Plain stand-ins for the few compiled operators that vLLM's wheel has for GPUs only; loaded by vLLM as a plugin."""

import torch


def put(key, value, keys, values, slots, isa, k_scale, v_scale, kind):
    """Write `[T, H, D]` into the pages `[blocks, H, size, D]`."""
    size = keys.shape[2]
    slots = slots[slots >= 0]
    keys[slots // size, :, slots % size] = key[: len(slots)]
    values[slots // size, :, slots % size] = value[: len(slots)]


def attend(query, keys, values, output, starts, lengths, scale, causal, alibi, window, table, cap, *others):
    """Attend to the pages of each request, one request after another, in float64."""
    size, groups = keys.shape[2], query.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        begin, end = starts[row].item(), starts[row + 1].item()
        if end == begin:
            continue
        pages = table[row, : -(-length // size)].long()
        own = [
            p[pages].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(groups, 1).double()
            for p in (keys, values)
        ]
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), own[0]) * scale
        if cap:
            scores = torch.tanh(scores / cap) * cap
        behind = (length - (end - begin) + torch.arange(end - begin))[:, None] - torch.arange(length)
        hidden = (behind < 0) if causal else torch.zeros_like(behind, dtype=torch.bool)
        if window is not None and window > 0:
            hidden = hidden | (behind >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        output[begin:end] = torch.einsum("hqk,khd->qhd", weights, own[1]).to(output.dtype)


def register():
    """Put them where vLLM looks for its own."""
    torch.ops._C.init_cpu_memory_env = lambda nodes: None
    torch.ops._C.get_scheduler_metadata = lambda *sizes: torch.empty(0)
    torch.ops._C.cpu_attn_reshape_and_cache = put
    torch.ops._C.cpu_attention_with_kv_cache = attend
    torch.ops._C.gelu_new = lambda out, x: out.copy_(torch.nn.functional.gelu(x, approximate="tanh"))
