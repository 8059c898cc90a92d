"""Kernels that allocate what Triton's do and compute nothing: for plans, on tensors that hold nothing.

They need neither triton nor a GPU. Tests hold them against what Triton's allocate, call by call and in training.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.gpu_worker.kernels.backend import TORCH, KernelChoice, Kernels
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.cross_entropy import MAX_LOGITS, CrossEntropy, LowRankHead
from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.paged_attention import PagedBatch
from services.gpu_worker.kernels.triton.attention_tiles import Shapes, forward_tiles
from services.gpu_worker.kernels.triton.sizes import LOSS_ROWS, LOSS_TOKENS, LOW_RANK_PART, loss_piece


def planned_kernels(choice: KernelChoice, on_gpu: bool) -> Kernels:
    """What stands in a plan for the kernels of an engine; auto: Triton's on a GPU. Raises ValueError for others."""
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels {choice!r} are none of auto, triton, torch")
    return ALLOCATIONS if choice == "triton" or (choice == "auto" and on_gpu) else TORCH


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _dense_like(x)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _dense_like(x), _dense_like(x)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _dense_like(dy)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _dense_like(x)


def rope_cache_write(
    q_NHE: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    return _dense_like(q_NHE)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _dense_like(gate)


def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _dense_like(dy), _dense_like(dy)


def accumulate_low_rank(
    grad_a: Tensor, grad_b: tuple[BlockGradient, ...], d_low: Tensor, x: Tensor, dy: Tensor, low: Tensor
) -> None:
    """Features that do not adjoin are put side by side."""
    _ = [dy[:, block.out] for block in grad_b]


def low_rank_backward_(
    dx: Tensor,
    grad_a: Tensor,
    grad_b: tuple[BlockGradient, ...],
    x: Tensor,
    dy: Tensor,
    low: Tensor,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    parts = dy.new_empty(-(-dy.shape[1] // LOW_RANK_PART), len(dy), len(a), dtype=torch.float32)
    accumulate_low_rank(grad_a, grad_b, parts[0], x, dy, low)
    return dx


def paged_attention(q_NHE: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    shapes = Shapes.of(q_NHE, keys, values, batch)
    n, h, e = q_NHE.shape
    out, lse = q_NHE.new_empty(n, h * e), q_NHE.new_empty(n, h, dtype=torch.float32)
    for form, tiles in batch.plan(("forward", shapes), lambda: forward_tiles(batch, shapes)):
        parts = out.new_empty(tiles.num_parts, shapes.num_kv_heads, form.rows, e, dtype=torch.float32)
        parts.new_empty(parts.shape[:-1])
    return out, lse


def paged_attention_backward(
    d_out: Tensor, q_NHE: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, batch: PagedBatch,
    dk_GTE: Tensor, dv_GTE: Tensor,
) -> Tensor:  # fmt: skip
    dense = d_out.contiguous(), out.contiguous(), lse.contiguous()
    sums, dq = torch.empty_like(dense[-1]), q_NHE.new_empty(q_NHE.shape)
    assert sums.shape == q_NHE.shape[:2]
    return dq


def linear_cross_entropy(
    x: Tensor,
    head: FrozenLinear,
    labels: Tensor,
    denominator: float,
    with_gradient: bool = True,
    low_rank: LowRankHead | None = None,
    max_logits: int = MAX_LOGITS,
) -> CrossEntropy:
    weight = head.dense().contiguous()
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx = torch.zeros_like(x) if with_gradient else None
    tiles = -(-len(weight) // LOSS_TOKENS)
    for start in range(0, len(x), LOSS_ROWS):
        rows = x[start : start + LOSS_ROWS]
        low = None if low_rank is None else rows @ low_rank.a.T
        lse = _measured(rows, labels[start : start + LOSS_ROWS], tiles)
        if with_gradient:
            size = loss_piece(len(weight), len(rows), max_logits)
            gradient = torch.empty(len(rows) * size, dtype=x.dtype, device=x.device).view(-1, size)
            if low is not None and low_rank is not None:
                d_low = torch.zeros_like(low, dtype=torch.float32)
                d_low.add_(gradient @ low_rank.b[:size])
                d_low = d_low.to(x.dtype)
        del lse
    return CrossEntropy(loss, correct, dx)


def _measured(rows: Tensor, labels: Tensor, tiles: int) -> Tensor:
    """The log-sum-exp of each row, from those of tiles of the vocabulary; with losses and hits, which are few."""
    parts, tops = (torch.empty(tiles, len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    places = torch.empty(tiles, len(rows), dtype=torch.int32, device=rows.device)
    at_label = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    lse = parts.logsumexp(0)
    best = places.gather(0, tops.argmax(0, keepdim=True))[0]
    losses = torch.where(labels >= 0, lse - at_label, 0).sum()
    hits = (best == labels).sum()
    assert losses.shape == hits.shape
    return lse


# what samples, updates parameters or adds many adapters is nothing that a plan runs
ALLOCATIONS: Kernels = replace(
    TORCH,
    name="triton",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rms_norm_backward=rms_norm_backward,
    rope=rope,
    rope_backward=rope,
    rope_cache_write=rope_cache_write,
    silu_mul=silu_mul,
    silu_mul_backward=silu_mul_backward,
    linear_cross_entropy=linear_cross_entropy,
    paged_attention=paged_attention,
    paged_attention_backward=paged_attention_backward,
    accumulate_low_rank=accumulate_low_rank,
    low_rank_backward_=low_rank_backward_,
)
