"""Loss of a window, finished during the forward: a window's loss gradient depends on its own labels only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.gpu_worker.kernels.cross_entropy import LowRankHead
from services.gpu_worker.kernels.transfer import Readback
from services.gpu_worker.model.transformer import Transformer


@dataclass(slots=True)
class WindowLoss:
    """Of a window's labelled tokens, on the device until somebody asks."""

    loss: Tensor
    num_correct: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Means:
    """Over labelled tokens, on their way to the host."""

    _loss_and_accuracy: Readback

    def read(self) -> tuple[float, float]:
        """Mean loss and token accuracy."""
        loss, accuracy = self._loss_and_accuracy.read().tolist()
        return loss, accuracy


@dataclass(slots=True)
class LossSum:
    """Sums over windows, each under a key: their order follows the keys, not which was computed first."""

    windows: dict[tuple[int, int], WindowLoss] = field(default_factory=dict)

    def means(self) -> Means:
        windows = [self.windows[key] for key in sorted(self.windows)]
        sums = torch.stack([torch.stack((w.loss.double(), w.num_correct.double())) for w in windows]).sum(0)
        return Means(Readback(sums / sum(w.count for w in windows)))


@torch.no_grad()
def window_loss(
    model: Transformer,
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    denominator: float,
    d_hidden: Tensor | None,
    low_rank: LowRankHead | None = None,
) -> WindowLoss | None:
    """A window's loss, None where it has no labels; writes the gradient of (sum of losses) / `denominator`.

    `hidden` [n, D] as `Transformer.forward` returns it, of which `rows` int64 [m] have a label each, `labels` int64
    [m]; the others skip the head. `d_hidden` [n, D] is overwritten, or None for an evaluation. `low_rank` is the
    adapter's part of the head. `hidden` and `d_hidden` may be one tensor.
    """
    chosen = hidden[rows]
    if d_hidden is not None:
        d_hidden.zero_()
    if not len(rows):
        return None
    weights = model.weights
    result = weights.kernels.linear_cross_entropy(
        model.final_norm(chosen),
        weights.head,
        labels,
        denominator,
        with_gradient=d_hidden is not None,
        low_rank=low_rank,
    )
    if d_hidden is not None and result.dx is not None:
        d_hidden[rows] = weights.kernels.rms_norm_backward(
            result.dx, chosen, weights.norm, weights.config.rms_norm_eps
        )
    return WindowLoss(result.loss_sum, result.num_correct, len(rows))
