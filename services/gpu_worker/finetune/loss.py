"""Loss of a window, finished during the forward: a window's loss gradient depends on its own labels only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.cross_entropy import LowRankHead, linear_cross_entropy
from services.gpu_worker.kernels.norm_rope import rms_norm_backward
from services.gpu_worker.model.transformer import Transformer


@dataclass(slots=True)
class LossSum:
    """Running sums over labelled tokens, on the device until somebody asks."""

    loss: Tensor
    num_correct: Tensor
    count: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> LossSum:
        return cls(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))

    def means(self) -> tuple[float, float]:
        """Mean loss and token accuracy."""
        return float(self.loss) / self.count, float(self.num_correct) / self.count


@torch.no_grad()
def window_loss(
    model: Transformer,
    hidden: Tensor,
    labels: Tensor,
    total: LossSum,
    denominator: float,
    d_hidden: Tensor | None,
    low_rank: LowRankHead | None = None,
) -> None:
    """Adds a window's loss to `total` and writes the gradient of (sum of losses) / `denominator`.

    `hidden` [n, D] as `Transformer.forward` returns it, `labels` int64 [n] with -100 for rows without one,
    which skip the head; `d_hidden` [n, D] is overwritten, or None for an evaluation. `low_rank` is the adapter's
    part of the head.
    """
    rows = (labels != -100).nonzero()[:, 0]
    if d_hidden is not None:
        d_hidden.zero_()
    if not len(rows):
        return
    chosen = hidden[rows]
    weights = model.weights
    result = linear_cross_entropy(
        model.final_norm(chosen),
        weights.head,
        labels[rows],
        denominator,
        with_gradient=d_hidden is not None,
        low_rank=low_rank,
    )
    total.loss = total.loss + result.loss_sum
    total.num_correct = total.num_correct + result.num_correct
    total.count += len(rows)
    if d_hidden is not None and result.dx is not None:
        d_hidden[rows] = rms_norm_backward(result.dx, chosen, weights.norm, weights.config.rms_norm_eps)
