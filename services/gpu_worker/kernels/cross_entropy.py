"""Linear + softmax cross-entropy over chunks of rows: full logits never exist.

Those of a chunk, of at most `max_logits` numbers, exist in the model's dtype, and become their own gradient where they
lie; in float32 there is a slab of them at a time, on a CPU small enough for its cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.norm_rope import accumulation_dtype

MAX_LOGITS = 1 << 24
MOST_ROWS = 128  # of a chunk: more is hardly faster
SLAB = 1 << 19  # numbers of a CPU's slab


@dataclass(slots=True)
class LowRankHead:
    """A low-rank part of the head: logits += x a^T b^T, with accumulators of unscaled gradients."""

    a: Tensor  # [R, D]
    b: Tensor  # [V, R], scaling included
    scale: float
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None


@dataclass(slots=True)
class CrossEntropy:
    loss_sum: Tensor  # scalar, summed over rows
    num_correct: Tensor  # scalar, rows whose most likely token is the label
    dx: Tensor | None  # gradient of loss_sum / denominator with respect to x, [N, D]


def linear_cross_entropy(
    x: Tensor,
    head: FrozenLinear,
    labels: Tensor,
    denominator: float,
    with_gradient: bool = True,
    low_rank: LowRankHead | None = None,
    max_logits: int = MAX_LOGITS,
) -> CrossEntropy:
    """`x` [N, D] (after the final norm), `head` [V, D], `labels` int64 [N]; every row has a label."""
    wide = accumulation_dtype(x.dtype)
    loss = torch.zeros((), dtype=wide, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx = torch.empty_like(x) if with_gradient else None
    rows_at_once = min(MOST_ROWS, max(1, max_logits // head.out_features))
    for start in range(0, x.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        chunk = _Rows(x[rows], head, labels[rows, None], low_rank)
        chunk.measure(denominator if with_gradient else None)
        loss += chunk.loss
        correct += chunk.num_correct
        if dx is not None:
            dx[rows] = chunk.input_gradient()
    return CrossEntropy(loss, correct, dx)


class _Rows:
    """A chunk of rows: `x` [n, D], `label` int64 [n, 1]."""

    def __init__(self, x: Tensor, head: FrozenLinear, label: Tensor, low_rank: LowRankHead | None) -> None:
        self.x, self.head, self.label, self.low_rank = x, head, label, low_rank
        self.low = None if low_rank is None else x @ low_rank.a.T
        self.loss = torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=x.device)
        self._logits = head.forward(x)  # then their gradient
        if low_rank is not None and self.low is not None:
            self._logits.addmm_(self.low, low_rank.b.T)

    def measure(self, denominator: float | None) -> None:
        """Loss and hits; with a denominator the logits become the gradient of the loss over it."""
        num_rows, vocabulary = self._logits.shape
        slab = num_rows if self.x.is_cuda else max(1, SLAB // vocabulary)
        for start in range(0, num_rows, slab):
            rows = slice(start, start + slab)
            self._measure(self._logits[rows], self.label[rows], denominator)

    def _measure(self, narrow: Tensor, label: Tensor, denominator: float | None) -> None:
        logits = narrow.to(self.loss.dtype)
        top, index = logits.max(-1, keepdim=True)
        at_label = logits.gather(1, label)
        exps = logits.sub_(top).exp_()
        total = exps.sum(-1, keepdim=True)
        self.loss += (top + total.log() - at_label).sum()
        self.num_correct += (index == label).sum()
        if denominator is not None:
            gradient = exps.div_(total * denominator)
            gradient.scatter_add_(1, label, gradient.new_full((), -1 / denominator).expand(label.shape))
            narrow.copy_(gradient)

    def input_gradient(self) -> Tensor:
        """Of the loss with respect to `x`; the low-rank part's are added to its own."""
        gradient, part = self._logits, self.low_rank
        dx = self.head.input_gradient(gradient)
        if part is None:
            return dx
        assert self.low is not None and part.grad_a is not None and part.grad_b is not None
        d_low = gradient @ part.b
        part.grad_b.add_(gradient.T @ self.low, alpha=part.scale)
        part.grad_a.add_(d_low.T @ self.x)
        return dx.addmm_(d_low, part.a)
