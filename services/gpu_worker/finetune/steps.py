"""AdamW over a job's flat masters, a part at a time: torch's optimizer, or one kernel a launch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.adamw import AdamW
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.transfer import Readback

PART = 1 << 18  # numbers that an update moves in one piece


class Stepper(Protocol):
    """Moves masters [n] by their gradients [n]; each part once between two calls of `begin`."""

    def begin(self, learning_rate: float, clip: Tensor) -> None:
        """The gradients count `clip` (a scalar beside them) times; they may be overwritten. NaN: nothing moves."""

    def move(self, start: int, end: int) -> None:
        """The parts [start, end)."""

    @property
    def num_steps(self) -> int:
        """That have moved anything; may wait for the device to know of the last one."""

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Exponential averages of the gradients and of their squares, [n] each; None before the first step."""

    def load(self, num_steps: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Takes the moments over."""

    @property
    def size_bytes(self) -> int:
        """Of the moments."""


def make_stepper(masters: Tensor, grad: Tensor, job: JobConfig, kernels: Kernels) -> Stepper:
    return (FusedAdamW if kernels.is_triton else TorchAdamW)(masters, grad, job, kernels)


class TorchAdamW:
    def __init__(self, masters: Tensor, grad: Tensor, job: JobConfig, kernels: Kernels) -> None:
        self._grad = grad
        self._parts, self._gradient_parts = masters.split(PART), grad.split(PART)
        self._optimizer = torch.optim.AdamW(
            self._parts,
            lr=job.learning_rate,
            betas=(job.beta1, job.beta2),
            eps=job.epsilon,
            weight_decay=job.weight_decay,
        )
        self._moves = True

    def begin(self, learning_rate: float, clip: Tensor) -> None:
        """On a GPU the host waits for `clip`."""
        factor = float(clip)
        self._moves = not math.isnan(factor)
        if self._moves and factor != 1.0:
            self._grad.mul_(factor)
        self._optimizer.param_groups[0]["lr"] = learning_rate

    def move(self, start: int, end: int) -> None:
        if not self._moves:
            return
        pairs = list(zip(self._parts[start:end], self._gradient_parts[start:end], strict=True))
        for part, gradient in pairs:
            part.grad = gradient
        self._optimizer.step()  # passes over those without a gradient
        for part, _ in pairs:
            part.grad = None

    @property
    def num_steps(self) -> int:
        states = self._optimizer.state
        return int(states[self._parts[0]]["step"]) if states else 0

    def moments(self) -> tuple[Tensor, Tensor] | None:
        states = self._optimizer.state
        if not states:
            return None
        own = [states[part] for part in self._parts if part in states]
        return torch.cat([s["exp_avg"] for s in own]), torch.cat([s["exp_avg_sq"] for s in own])

    def load(self, num_steps: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        moments = zip(exp_avg.split(PART), exp_avg_sq.split(PART), strict=True)
        for part, (first, second) in zip(self._parts, moments, strict=True):
            step = torch.tensor(float(num_steps))
            self._optimizer.state[part] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for part in self._optimizer.state.values() for tensor in part.values())


class FusedAdamW:
    """In one pass over memory, clipping included."""

    def __init__(self, masters: Tensor, grad: Tensor, job: JobConfig, kernels: Kernels) -> None:
        self._masters, self._grad, self._kernels = masters, grad, kernels
        self._update = AdamW(0, job.learning_rate, job.beta1, job.beta2, job.epsilon, job.weight_decay)
        self._clip: Tensor | None = None
        self._unread: Readback | None = None  # the last `clip`, as long as the host does not know it
        self._moments: tuple[Tensor, Tensor] | None = None

    def begin(self, learning_rate: float, clip: Tensor) -> None:
        self._update = replace(self._update, step=self.num_steps + 1, learning_rate=learning_rate)
        self._clip, self._unread = clip.float(), Readback(clip)
        if self._moments is None:
            self._moments = torch.zeros_like(self._masters), torch.zeros_like(self._masters)

    def move(self, start: int, end: int) -> None:
        assert self._moments is not None and self._clip is not None, "begin comes first"
        part = slice(start * PART, end * PART)
        exp_avg, exp_avg_sq = (moment[part] for moment in self._moments)
        self._kernels.adamw_(
            self._masters[part], self._grad[part], exp_avg, exp_avg_sq, self._update, self._clip
        )

    @property
    def num_steps(self) -> int:
        unread, self._unread = self._unread, None
        if unread is not None and math.isnan(unread.read()):
            self._update = replace(self._update, step=self._update.step - 1)
        return self._update.step

    def moments(self) -> tuple[Tensor, Tensor] | None:
        return self._moments

    def load(self, num_steps: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self._update, self._unread = replace(self._update, step=num_steps), None
        self._moments = exp_avg, exp_avg_sq

    @property
    def size_bytes(self) -> int:
        return sum(moment.nbytes for moment in self._moments or ())
