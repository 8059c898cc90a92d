"""Low-rank parts of all runs of a stream at once, where an engine's kernels have a form for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.lora_stream import LoraStream, StreamRun
from services.gpu_worker.model.context import AdapterRun, LowRank, RunByRun
from services.gpu_worker.model.peft import GROUPS
from services.gpu_worker.model.weights import ModelWeights


def low_rank_of(runs: Sequence[AdapterRun], weights: ModelWeights) -> LowRank:
    """One launch takes what needs nothing but its two products. Dropout, and ranks that move tensors in between, are
    computed run by run, as everything is on torch's kernels."""
    if not weights.kernels.is_triton:
        return RunByRun(runs)
    together: list[StreamRun] = []
    alone: list[AdapterRun] = []
    for run in runs:
        pairs = None if run.dropout is not None else run.weights.low_rank_pairs
        if pairs is None:
            alone.append(run)
        else:
            together.append(StreamRun(run.start, run.end, pairs))
    return Together(LoraStream(tuple(together), weights.device), weights.kernels, RunByRun(alone))


@dataclass(frozen=True, slots=True)
class Together:
    stream: LoraStream
    kernels: Kernels
    others: RunByRun

    def add_(self, y: Tensor, x: Tensor, layer: int, group: str) -> None:
        if not self.stream.is_empty:
            self.kernels.add_low_rank_(y, x, self.stream, layer, GROUPS.index(group))
        self.others.add_(y, x, layer, group)
