"""Low-rank parts of all runs of a stream at once, where an engine's kernels or its processor have a form for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.lora_stream import LoraStream, StreamRun
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.adapter_stack import AdapterStack, StackedRows
from services.gpu_worker.model.context import AdapterRun, LowRank, RunByRun
from services.gpu_worker.model.peft import GROUPS
from services.gpu_worker.model.weights import ModelWeights

STACKED_ROWS = 64  # more rows pay for products with others' adapters


def low_rank_of(runs: Sequence[AdapterRun], weights: ModelWeights, pool: AdapterPool) -> LowRank:
    """`runs` in the order of their rows, decodes last. Dropout, and ranks that move tensors in between, are computed
    run by run, as everything else is on torch's kernels that has no adapters of `pool` in a few rows."""
    if weights.kernels.is_triton:
        return _in_one_launch(runs, weights)
    few = _few_rows(runs)
    stack = pool.stack(run.weights for run in few)
    return RunByRun(runs) if stack is None else _stacked(runs, few, stack)


def _in_one_launch(runs: Sequence[AdapterRun], weights: ModelWeights) -> LowRank:
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


def _few_rows(runs: Sequence[AdapterRun]) -> Sequence[AdapterRun]:
    """The last runs, as many as lie in STACKED_ROWS rows."""
    return [run for run in runs if runs[-1].end - run.start <= STACKED_ROWS]


def _stacked(runs: Sequence[AdapterRun], few: Sequence[AdapterRun], stack: AdapterStack) -> LowRank:
    together = [run for run in few if run.weights in stack]
    if len(together) < 2:
        return RunByRun(runs)
    start, end = together[0].start, together[-1].end
    owners = [-1] * (end - start)
    for run in together:
        owners[run.start - start : run.end - start] = [stack.number(run.weights)] * (run.end - run.start)
    alone = [run for run in runs if run.start < start or run.weights not in stack]
    return Stacked(StackedRows(stack, slice(start, end), owners), RunByRun(alone))


@dataclass(frozen=True, slots=True)
class Stacked:
    rows: StackedRows
    others: RunByRun

    def add_(self, y: Tensor, x: Tensor, layer: int, group: str) -> None:
        self.rows.add_(y, x, layer, group)
        self.others.add_(y, x, layer, group)
