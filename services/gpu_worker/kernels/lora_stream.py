"""Low-rank parts of all of a model's linears for one stream of rows, so that a step places its tables once.

The twin for GPUs, which does all runs of a linear in two launches, is `kernels/triton/lora_stream.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
Pair = tuple[Tensor, Tensor]  # A [R, in], and B [out, R] with the scaling in it


class LoraPairs:
    """One adapter's pairs, a layer's linears by number; None where it has none. Their memory stays the same."""

    def __init__(self, layers: Sequence[Sequence[Pair | None]]) -> None:
        """Raises ValueError for a pair that is not dense or has no common rank, or where layers differ in more than
        their ranks."""
        self.layers = tuple(tuple(pairs) for pairs in layers)
        self.widths = [self._widths(linear) for linear in range(len(self.layers[0]))]  # in, out
        for pair in self.all:
            if not all(t.is_contiguous() for t in pair) or pair[0].shape[0] != pair[1].shape[1]:
                raise ValueError(
                    f"A {list(pair[0].shape)} and B {list(pair[1].shape)} are no dense pair of a rank"
                )
        self.dtypes = {tensor.dtype for pair in self.all for tensor in pair}
        numbers = [
            (0, 0, 0) if pair is None else (pair[0].data_ptr(), pair[1].data_ptr(), pair[0].shape[0])
            for pairs in self.layers
            for pair in pairs
        ]
        self.addresses = torch.tensor(numbers, dtype=torch.int64).view(
            len(self.layers), -1, 3
        )  # and the rank

    def _widths(self, linear: int) -> tuple[int, int] | None:
        pairs = [layer[linear] for layer in self.layers]
        found = {(pair[0].shape[1], pair[1].shape[0]) for pair in pairs if pair is not None}
        if len(found) > 1:
            raise ValueError(f"pairs of one linear are of {found}")
        return found.pop() if found else None

    @property
    def all(self) -> list[Pair]:
        return [pair for pairs in self.layers for pair in pairs if pair is not None]


@dataclass(frozen=True, slots=True)
class StreamRun:
    """Rows [start, end) that use one adapter."""

    start: int
    end: int
    pairs: LoraPairs


@dataclass(frozen=True, slots=True)
class LoraStream:
    """Runs in the order of their rows, which overlap nowhere. There may be a plan without runs: tables that are
    filled anew for every step."""

    runs: tuple[StreamRun, ...]
    device: torch.device
    _plans: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        return not (self.runs or self._plans)

    def plan(self, key: str, make: Callable[[], Plan]) -> Plan:
        """What a kernel works out once for all linears."""
        if key not in self._plans:
            self._plans[key] = make()
        found: Plan = self._plans[key]
        return found


def add_low_rank_(y: Tensor, x: Tensor, stream: LoraStream, layer: int, linear: int) -> Tensor:
    """`y` [N, out] += each run's rows of `x` [N, in] times its A^T B^T; rows of no run stay."""
    for run in stream.runs:
        pair = run.pairs.layers[layer][linear]
        if pair is not None:
            rows = slice(run.start, run.end)
            y[rows].addmm_(x[rows] @ pair[0].T, pair[1].T)
    return y
