"""Low-rank bypasses of a linear, for a token stream in which each run of rows has an adapter of its own.

A bypass adds `(x A^T) B^T`. The scaling alpha / r is part of `B`, and where one linear computes several
projections (q, k and v; gate and up) `A` stacks theirs and `B` is block-diagonal, so that every rank and every
choice of targets is one pair of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) with the bypass A [R, in], B [out, R]; `mask` [rows, in] multiplies what A reads."""

    start: int
    end: int
    a: Tensor
    b: Tensor
    mask: Tensor | None = None


def lora_add_(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Adds every segment's bypass to its rows of `y` [N, out], in place; other rows cost nothing."""
    for segment in segments:
        rows = x[segment.start : segment.end]
        if segment.mask is not None:
            rows = rows * segment.mask
        y[segment.start : segment.end].addmm_(rows @ segment.a.T, segment.b.T)
    return y


@dataclass(frozen=True, slots=True)
class BlockGradient:
    """Accumulator of one projection's B: rows `out` of the linear, columns `rank` of the stacked A."""

    out: slice
    rank: slice
    scale: float
    grad: Tensor  # float32 [out, r]


def lora_backward(
    dy: Tensor,
    x: Tensor,
    bypass: Segment,
    dx: Tensor | None,
    grad_a: Tensor,
    grads_b: Sequence[BlockGradient],
) -> None:
    """Adds the bypass's part to `dx` [N, in] and to the float32 gradients of the stacked A and of each B."""
    if bypass.mask is not None:
        x = x * bypass.mask
    low = x @ bypass.a.T  # recomputed: N * R values are cheaper than their bytes
    d_low = dy @ bypass.b
    grad_a.add_(d_low.T @ x)
    for block in grads_b:
        block.grad.add_(dy[:, block.out].T @ low[:, block.rank], alpha=block.scale)
    if dx is None:
        return
    if bypass.mask is None:
        dx.addmm_(d_low, bypass.a)
    else:
        dx.add_((d_low @ bypass.a).mul_(bypass.mask))
