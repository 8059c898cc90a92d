"""Low-rank parts of a token stream in which every run of rows has its own adapter, of whatever rank.

All ranks' intermediates lie in one flat tensor, `low`: run after run, [rows, rank] each, with no padding.
Twins for GPUs: `kernels/triton/lora.py`, which does all runs in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from services.gpu_worker.kernels.bypass import BlockGradient, accumulate_blocks, accumulate_product


@dataclass(frozen=True, slots=True)
class LoraRun:
    """Rows [start, end) of the stream that use one adapter; in training, with accumulators of its gradients."""

    start: int
    end: int
    a: Tensor  # [R, in]
    b: Tensor  # [out, R], scaling included
    grad_a: Tensor | None = None  # float32 [R, in]
    grad_b: tuple[BlockGradient, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoraRuns:
    """The runs of one fused linear [out, in], in the order of their rows."""

    def __init__(self, runs: Sequence[LoraRun]) -> None:
        """Raises ValueError where runs overlap, shapes differ, or two runs share an accumulator."""
        self.runs = tuple(runs)
        self.in_features = self.runs[0].a.shape[1] if runs else 0
        self.out_features = self.runs[0].b.shape[0] if runs else 0
        self._check()
        self.low_starts = [0, *accumulate(run.num_rows * run.rank for run in self.runs)]
        self.plans: dict[str, Any] = {}  # what a form of the kernels has made of the runs, to be used again

    @property
    def max_rank(self) -> int:
        return max((run.rank for run in self.runs), default=0)

    def new_low(self, x: Tensor) -> Tensor:
        """Room for all intermediates of `x` [N, in]."""
        return x.new_empty(self.low_starts[-1])

    def split(self, low: Tensor) -> list[Tensor]:
        """Views [rows, rank] of each run's."""
        sizes = [run.num_rows * run.rank for run in self.runs]
        pairs = zip(low.split(sizes), self.runs, strict=True) if sizes else ()
        return [part.view(run.num_rows, run.rank) for part, run in pairs]

    def _check(self) -> None:
        for run in self.runs:
            expected = (run.rank, self.in_features), (self.out_features, run.rank)
            if run.start >= run.end or (tuple(run.a.shape), tuple(run.b.shape)) != expected:
                raise ValueError(
                    f"rows {run.start} to {run.end} with A {list(run.a.shape)} and B {list(run.b.shape)} are no run"
                    f" of a linear [{self.out_features}, {self.in_features}]"
                )
        for before, after in pairwise(self.runs):
            if after.start < before.end:
                raise ValueError(f"a run that starts at row {after.start} overlaps one to row {before.end}")
        grads = [run.grad_a for run in self.runs if run.grad_a is not None]
        grads += [block.grad for run in self.runs for block in run.grad_b]
        if len({grad.data_ptr() for grad in grads}) < len(grads):
            raise ValueError("two runs share an accumulator: their rows have to be one run")


def lora_shrink(x: Tensor, runs: LoraRuns) -> Tensor:
    """`x` [N, in] times each run's A^T, as the flat intermediates."""
    low = runs.new_low(x)
    for run, part in zip(runs.runs, runs.split(low), strict=True):
        torch.mm(x[run.rows], run.a.T, out=part)
    return low


def lora_expand_(y: Tensor, low: Tensor, runs: LoraRuns) -> Tensor:
    """`y` [N, out] += the intermediates times each run's B^T; rows of no run stay."""
    for run, part in zip(runs.runs, runs.split(low), strict=True):
        y[run.rows].addmm_(part, run.b.T)
    return y


def lora_backward_(dx: Tensor | None, dy: Tensor, x: Tensor, low: Tensor, runs: LoraRuns) -> None:
    """Adds the gradients of `lora_expand_(y, lora_shrink(x))`: to `dx` [N, in], where anybody wants it, and to the
    runs' accumulators. `low` is what `lora_shrink(x)` gave."""
    for run, part in zip(runs.runs, runs.split(low), strict=True):
        d_low = dy[run.rows] @ run.b
        accumulate_blocks(run.grad_b, dy[run.rows], part)
        if run.grad_a is not None:
            accumulate_product(run.grad_a, d_low, x[run.rows])
        if dx is not None:
            dx[run.rows].addmm_(d_low, run.a)
