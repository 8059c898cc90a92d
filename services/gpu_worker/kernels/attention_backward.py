"""Gradient of `window_attention` for one window, given the sequence's keys and values up to its end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.gpu_worker.kernels.attention import group_heads, ungroup_heads
from services.gpu_worker.kernels.norm_rope import accumulation_dtype


def window_attention_backward(
    d_out: Tensor, q_NHE: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse_NH: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_out`, `out` [N, H * E]; `keys`, `values` [G, S, E]; the rest as the forward had and gave them.

    Returns dQ [N, H, E], complete, and dK, dV [G, S, E], this window's part of the sequence's sum.
    """
    n, h, e = q_NHE.shape
    g = keys.shape[0]
    q, do, o = (group_heads(t.reshape(n, h, e), g) for t in (q_NHE, d_out, out))
    backward = _flash_backward if q.device.type == "cpu" else _math_backward
    dq, dk, dv = backward(do, q, keys, values, o, lse_NH.T.reshape(g, -1), mask)
    return ungroup_heads(dq, n), dk, dv


def _flash_backward(
    do: Tensor, q: Tensor, keys: Tensor, values: Tensor, o: Tensor, lse: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's blocked kernel for CPUs. `do`, `q`, `o` [G, rows, E], `lse` [G, rows]."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do[None], q[None], keys[None], values[None], o[None], lse[None], 0.0, False, attn_mask=mask
    )
    return dq[0], dk[0], dv[0]


def _math_backward(
    do: Tensor, q: Tensor, keys: Tensor, values: Tensor, o: Tensor, lse: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by whole matrices, on any device."""
    wide = accumulation_dtype(q.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    probs = torch.exp(torch.bmm(q, keys.transpose(1, 2)).to(wide) * scale + mask - lse[..., None])
    dp = torch.bmm(do, values.transpose(1, 2)).to(wide)
    row = (do.to(wide) * o.to(wide)).sum(-1, keepdim=True)
    ds = (probs * (dp - row) * scale).to(q.dtype)
    dv = torch.bmm(probs.to(q.dtype).transpose(1, 2), do)
    return torch.bmm(ds, keys), torch.bmm(ds.transpose(1, 2), q), dv
