"""AdamW on flat tensors; the twin for GPUs, one launch, is `kernels/triton/adamw.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdamW:
    """The numbers of an update; `step` counts from 1."""

    step: int
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    @property
    def step_size(self) -> float:
        """The learning rate, corrected for a first moment that began at zero."""
        return self.learning_rate / (1 - self.beta1**self.step)

    @property
    def correction(self) -> float:
        """What the root of the second moment is divided by, for the same reason."""
        return math.sqrt(1 - self.beta2**self.step)

    @property
    def kept(self) -> float:
        """What decoupled weight decay leaves of a parameter."""
        return 1 - self.learning_rate * self.weight_decay


def adamw_(
    masters: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: AdamW,
    clip: Tensor | float = 1.0,
    copy: Tensor | None = None,
) -> None:
    """Moves `masters` [n] and the moments [n]; `grad` [n] counts `clip` times and stays as it is.

    `clip` may be a number on the device, so that nobody waits for the norm that it comes from; where that is NaN,
    nothing moves. `copy` [n], of any type, gets the moved masters.
    """
    state = masters, exp_avg, exp_avg_sq
    before = [tensor.clone() for tensor in state]
    clipped = grad * clip
    exp_avg.lerp_(clipped, 1 - update.beta1)
    exp_avg_sq.mul_(update.beta2).addcmul_(clipped, clipped, value=1 - update.beta2)
    scale = (exp_avg_sq.sqrt() / update.correction).add_(update.epsilon)
    masters.mul_(update.kept).addcdiv_(exp_avg, scale, value=-update.step_size)
    if isinstance(clip, Tensor):
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(torch.where(clip.isnan(), old, tensor))
    if copy is not None:
        copy.copy_(masters)


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """What makes a gradient's norm at most `most`, as torch's clip_grad_norm_ has it, or leaves it as it is (0); a
    scalar beside `norm`. NaN for a norm that is not finite."""
    factor = (most / (norm + 1e-6)).clamp(max=1) if most else torch.ones_like(norm)
    return torch.where(norm.isfinite(), factor, torch.nan)
