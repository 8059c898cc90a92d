"""Causal grouped-query attention over gathered pages: one-token queries batched, longer windows one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import accumulation_dtype


def group_heads(x_NHE: Tensor, num_kv_heads: int) -> Tensor:
    """[N, H, E] -> [G, (H/G) * N, E]: the heads that share keys become rows of one product."""
    n, h, e = x_NHE.shape
    group = h // num_kv_heads
    return x_NHE.view(n, num_kv_heads, group, e).permute(1, 2, 0, 3).reshape(num_kv_heads, group * n, e)


def ungroup_heads(x: Tensor, num_tokens: int) -> Tensor:
    """Inverse of `group_heads`."""
    g, rows, e = x.shape
    group = rows // num_tokens
    return x.view(g, group, num_tokens, e).permute(2, 0, 1, 3).reshape(num_tokens, g * group, e)


def length_mask(context_lens: Tensor, num_keys: int, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B * G, 1, T] that hides the keys at and after each sequence's context length."""
    hidden = torch.arange(num_keys, device=context_lens.device)[None] >= context_lens[:, None]
    mask = torch.zeros(hidden.shape, dtype=accumulation_dtype(dtype), device=context_lens.device)
    return mask.masked_fill_(hidden, float("-inf")).repeat_interleave(num_kv_heads, 0)[:, None]


def decode_attention(q_BHE: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query token a sequence. `keys`, `values` [B * G, T, E], `mask` [B * G, 1, T] -> [B, H * E]."""
    b, h, e = q_BHE.shape
    grouped = q_BHE.reshape(keys.shape[0], -1, e)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).to(mask.dtype)
    probs = torch.softmax(scores.mul_(1 / math.sqrt(e)).add_(mask), -1).to(values.dtype)
    return torch.bmm(probs, values).view(b, h * e)


def causal_mask(
    num_tokens: int, num_keys: int, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [group * N, S] for the last N of S positions, repeated for each head of a group."""
    positions = torch.arange(num_keys - num_tokens, num_keys, device=device)
    hidden = torch.arange(num_keys, device=device)[None] > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask.repeat(group, 1)


def window_attention(q_NHE: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The last N tokens of a sequence against its S keys.

    `keys`, `values` [G, S, E], `mask` from `causal_mask`. Returns the output [N, H * E] and the natural
    log-sum-exp of the scaled scores [N, H], which `window_attention_backward` reads instead of probabilities.
    """
    n, h, _ = q_NHE.shape
    attend = _flash if q_NHE.device.type == "cpu" else _math
    out, lse = attend(group_heads(q_NHE, keys.shape[0]), keys, values, mask)
    return ungroup_heads(out, n).flatten(1), lse.reshape(h, n).T


def _flash(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """torch's blocked kernel for CPUs. `q` [G, rows, E] -> output of the same shape and lse [G, rows]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], keys[None], values[None], 0.0, False, attn_mask=mask
    )
    return out[0], lse[0]


def _math(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same by whole matrices, on any device."""
    scores = (
        torch.bmm(q, keys.transpose(1, 2)).to(accumulation_dtype(q.dtype)) / math.sqrt(q.shape[-1]) + mask
    )
    lse = torch.logsumexp(scores, -1)
    return torch.bmm(torch.exp(scores - lse[..., None]).to(values.dtype), values), lse
