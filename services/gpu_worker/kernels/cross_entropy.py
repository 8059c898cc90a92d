"""Linear + softmax cross-entropy over chunks of rows and of the vocabulary: full logits never exist.

At most `max_logits` logits exist at a time, in the model's dtype and in float32 at once: 96 MiB by default for
a bfloat16 model, 64 MiB for a float32 one. Where a few rows of the whole vocabulary fit, each logit is
computed once; otherwise the vocabulary is cut and the second pass, for the gradient, computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.norm_rope import accumulation_dtype

MAX_LOGITS = 1 << 24
MOST_ROWS, FEWEST_ROWS = 256, 64  # of a chunk: more is no faster, fewer waste the product


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
    rows_at_once = min(MOST_ROWS, max(FEWEST_ROWS, max_logits // head.out_features))
    for start in range(0, x.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        chunk = _Rows(x[rows], head, labels[rows, None], low_rank, max(1, max_logits // rows_at_once))
        chunk.measure()
        loss += chunk.loss
        correct += chunk.num_correct
        if dx is not None:
            dx[rows] = chunk.gradient(denominator)
    return CrossEntropy(loss, correct, dx)


class _Rows:
    """A chunk of rows against the vocabulary, piece by piece."""

    def __init__(
        self, x: Tensor, head: FrozenLinear, label: Tensor, low_rank: LowRankHead | None, piece: int
    ) -> None:
        self.x, self.head, self.label, self.low_rank = x, head, label, low_rank
        self.piece = piece
        self.low = None if low_rank is None else x @ low_rank.a.T
        self._only: Tensor | None = None  # the logits, where one piece is all

    def _pieces(self) -> Iterator[slice]:
        vocab = self.head.out_features
        for start in range(0, vocab, self.piece):
            yield slice(start, min(start + self.piece, vocab))

    def _logits(self, tokens: slice) -> Tensor:
        whole = tokens == slice(0, self.head.out_features)
        logits = self.head.forward(self.x) if whole else linear(self.x, self.head.dense()[tokens])
        if self.low_rank is not None and self.low is not None:
            logits.addmm_(self.low, self.low_rank.b[tokens].T)
        return logits.to(accumulation_dtype(self.x.dtype))

    def measure(self) -> None:
        """Log-sum-exp, loss and hits, the maximum and the sum carried from piece to piece."""
        wide = accumulation_dtype(self.x.dtype)
        n = self.x.shape[0]
        largest = self.x.new_full((n, 1), float("-inf"), dtype=wide)
        total, at_label = torch.zeros_like(largest), torch.zeros_like(largest)
        best = torch.zeros_like(self.label)
        for tokens in self._pieces():
            logits = self._logits(tokens)
            top, index = logits.max(-1, keepdim=True)
            best = torch.where(top > largest, index + tokens.start, best)
            inside = (self.label >= tokens.start) & (self.label < tokens.stop)
            own = logits.gather(1, (self.label - tokens.start).clamp(0, logits.shape[1] - 1))
            at_label = torch.where(inside, own, at_label)
            risen = torch.maximum(top, largest)
            exps = logits.sub_(
                risen
            ).exp_()  # in place: a piece of logits is the largest tensor that there is
            total = total * (largest - risen).exp() + exps.sum(-1, keepdim=True)
            largest = risen
            self._only = exps if logits.shape[1] == self.head.out_features else None
            del logits, exps  # or they would be there beside the next piece
        self.lse = largest + total.log()
        self._total = total
        self.loss = (self.lse - at_label).sum()
        self.num_correct = (best == self.label).sum()

    def gradient(self, denominator: float) -> Tensor:
        """Of the loss over `denominator` with respect to `x`; the low-rank part's are added to its own."""
        dx = torch.zeros_like(self.x)
        d_low = None if self.low is None else torch.zeros_like(self.low)
        for tokens in self._pieces():
            grad = self._probabilities(tokens, denominator)
            inside = (self.label >= tokens.start) & (self.label < tokens.stop)
            place = (self.label - tokens.start).clamp(0, grad.shape[1] - 1)
            grad.scatter_add_(1, place, inside.to(grad.dtype) * (-1 / denominator))
            grad = grad.to(self.x.dtype)
            if grad.shape[1] == self.head.out_features:
                dx = self.head.input_gradient(grad)
            else:
                dx.addmm_(grad, self.head.dense()[tokens])
            if self.low_rank is not None and d_low is not None and self.low is not None:
                d_low += grad @ self.low_rank.b[tokens]
                assert self.low_rank.grad_b is not None
                self.low_rank.grad_b[tokens].add_(grad.T @ self.low, alpha=self.low_rank.scale)
            del grad
        if self.low_rank is not None and d_low is not None:
            assert self.low_rank.grad_a is not None
            self.low_rank.grad_a.add_(d_low.T @ self.x)
            dx.addmm_(d_low, self.low_rank.a)
        return dx

    def _probabilities(self, tokens: slice, denominator: float) -> Tensor:
        """Softmax over `denominator`."""
        if self._only is not None:
            return self._only.div_(self._total * denominator)
        return self._logits(tokens).sub_(self.lse).exp_().div_(denominator)
