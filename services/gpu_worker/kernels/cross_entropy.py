"""Linear + softmax cross-entropy over chunks of rows: full logits never exist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import accumulation_dtype

CHUNK_ROWS = 256


@dataclass(slots=True)
class CrossEntropy:
    loss_sum: Tensor  # scalar, summed over rows
    num_correct: Tensor  # scalar, rows whose most likely token is the label
    dx: Tensor | None  # gradient of loss_sum / denominator with respect to x, [N, D]


def linear_cross_entropy(
    x: Tensor, head: Tensor, labels: Tensor, denominator: float, with_gradient: bool = True
) -> CrossEntropy:
    """`x` [N, D] (after the final norm), `head` [V, D] frozen, `labels` int64 [N]; every row has a label."""
    wide = accumulation_dtype(x.dtype)
    loss = torch.zeros((), dtype=wide, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx = torch.empty_like(x) if with_gradient else None
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        label = labels[rows, None]
        logits = (x[rows] @ head.T).to(wide)
        best = logits.argmax(-1, keepdim=True)
        correct += (best == label).sum()
        largest = logits.gather(1, best)
        at_label = logits.gather(1, label) - largest
        exps = logits.sub_(largest).exp_()  # in place: a chunk of logits is the largest tensor that there is
        total = exps.sum(-1, keepdim=True)
        loss += (total.log() - at_label).sum()
        if dx is not None:
            grad = exps.div_(total * denominator)
            grad.scatter_add_(1, label, grad.new_full(label.shape, -1 / denominator))
            dx[rows] = grad.to(x.dtype) @ head
    return CrossEntropy(loss, correct, dx)
