"""What a forward pass needs to know beside the tokens: where each row's keys are and whose adapter it uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from services.gpu_worker.kernels.bypass import Bypass
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.attention import Attention
from services.gpu_worker.model.parallel import ALONE, Group
from services.gpu_worker.model.peft import base_label
from services.gpu_worker.model.weights import LayerWeights


class ActivationSink(Protocol):
    """Keeps what it wants of [n, width] rows as the tokens from `start` on of a training sequence."""

    def save(self, layer: int, name: str, start: int, rows: Tensor) -> None: ...


class LayerProgram(Protocol):
    """One decoder layer, compiled: (x [N, D], weights, context) -> [N, D]."""

    def __call__(self, x: Tensor, w: LayerWeights, ctx: LayerContext, /) -> Tensor: ...


@dataclass(slots=True)
class Capture:
    """Rows whose activations a training sequence keeps as its tokens from `start` on."""

    rows: slice
    sink: ActivationSink
    start: int


@dataclass(slots=True)
class VirtualRows:
    """Rows of the stream that stand for virtual tokens, and which of the adapter's they are; int64 [n] each."""

    rows: Tensor
    tokens: Tensor


@dataclass(slots=True)
class AdapterRun:
    """Rows [start, end) that use one adapter; in training they are the tokens from `first_token` on."""

    start: int
    end: int
    weights: AdapterWeights
    dropout: Dropout | None = None
    first_token: int = 0
    virtual: VirtualRows | None = None
    capture: Capture | None = None  # in training, of outputs before a bypass has changed them

    def mask(self, layer: int, group: str, x: Tensor) -> Tensor | None:
        """Dropout of what a low-rank part reads of `x`, the run's rows."""
        if self.dropout is None:
            return None
        tokens = slice(self.first_token, self.first_token + self.end - self.start)
        return self.dropout.mask(layer, group, tokens, x, self.weights.part_of_input(group))


def runs_of(spans: Iterable[tuple[int, int, AdapterWeights | None]]) -> list[AdapterRun]:
    """(first row, end, adapter) of neighbours, joined where they share an adapter; the base model's are in none."""
    runs: list[AdapterRun] = []
    for start, end, weights in spans:
        if weights is None:
            continue
        if runs and runs[-1].end == start and runs[-1].weights is weights:
            runs[-1].end = end
        else:
            runs.append(AdapterRun(start, end, weights))
    return runs


class LowRank(Protocol):
    """What the low-rank parts of a stream's runs add to a fused linear's output."""

    def add_(self, y: Tensor, x: Tensor, layer: int, group: str) -> None:
        """`y` [N, out] += the low-rank parts of `x` [N, in]."""


@dataclass(frozen=True, slots=True)
class RunByRun:
    runs: Sequence[AdapterRun]

    def add_(self, y: Tensor, x: Tensor, layer: int, group: str) -> None:
        for run in self.runs:
            bypass = run.weights.layers[layer].get(group)
            if bypass is not None:
                read = x[run.start : run.end]
                bypass.add_low_rank_(y[run.start : run.end], read, run.mask(layer, group, read))


@dataclass(slots=True)
class ForwardContext:
    """One fused forward over N rows."""

    positions: Tensor  # int64 [N]
    slots: Tensor  # where the rows' keys and values are written, from KVCache.slots
    program: LayerProgram
    attention: Attention
    adapters: list[AdapterRun] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    low_rank: LowRank = field(init=False)  # of the adapters; run by run until somebody knows better

    def __post_init__(self) -> None:
        self.low_rank = RunByRun(self.adapters)


@dataclass(slots=True)
class LayerContext:
    """A forward pass as one layer sees it; the operations of `model/layer.py` that need more than tensors."""

    index: int
    rotation: tuple[Tensor, Tensor]  # cosines and sines of the rows' positions, [N, E]
    cache: KVCache
    batch: ForwardContext
    group: Group = ALONE

    def all_reduce_(self, x: Tensor) -> Tensor:
        return self.group.all_reduce_(x)

    def virtual_rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for run in self.batch.adapters:
            if run.virtual is not None and "prefix.rows" in run.weights.outside:
                keys, values = run.weights.prefix(self.index)
                k = k.index_copy(0, run.virtual.rows, keys[run.virtual.tokens])
                v = v.index_copy(0, run.virtual.rows, values[run.virtual.tokens])
        return k, v

    def cache_write(self, k: Tensor, v: Tensor) -> None:
        heads = (-1, self.cache.head_dim)
        self.cache.write(self.index, self.batch.slots, k.unflatten(-1, heads), v.unflatten(-1, heads))

    def attend(self, q: Tensor, cached: None) -> tuple[Tensor, Tensor]:
        q_NHE = q.unflatten(-1, (-1, self.cache.head_dim))
        return self.batch.attention.attend(q_NHE, self.cache, self.index)

    def bypass(self, y: Tensor, x: Tensor, group: str) -> Tensor:
        return self.bypass_change(self.bypass_low_rank(y, x, group), x, group)

    def bypass_low_rank(self, y: Tensor, x: Tensor, group: str) -> Tensor:
        self.batch.low_rank.add_(y, x, self.index, group)
        return y

    def bypass_change(self, y: Tensor, x: Tensor, group: str) -> Tensor:
        for run, bypass in self._bypasses(group):
            out = y[run.start : run.end]
            for name, rows in bypass.bases if run.capture is not None else ():
                assert run.capture is not None
                run.capture.sink.save(self.index, base_label(name), run.capture.start, out[:, rows])
            bypass.change_(out, x[run.start : run.end])
        return y

    def _bypasses(self, group: str) -> Iterator[tuple[AdapterRun, Bypass]]:
        for run in self.batch.adapters:
            bypass = run.weights.layers[self.index].get(group)
            if bypass is not None:
                yield run, bypass

    def bypass_input(self, x: Tensor, group: str) -> Tensor:
        for run in self.batch.adapters:
            bypass = run.weights.layers[self.index].get(group)
            if bypass is not None and bypass.input_scale is not None:
                x[run.start : run.end].mul_(bypass.input_scale)
        return x

    def keep(self, x: Tensor, name: str) -> None:
        for capture in self.batch.captures:
            capture.sink.save(self.index, name, capture.start, x[capture.rows])
