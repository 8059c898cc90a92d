"""What a forward pass needs to know beside the tokens: where each row's keys are and whose adapter it uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.lora import Segment
from services.gpu_worker.model.adapters import LoraWeights


@dataclass(slots=True)
class LayerActivations:
    """Tensors of one layer over all N rows that a backward may want; views, valid until the layer ends."""

    x: Tensor  # layer input [N, D]
    q: Tensor  # q projection, before its norm and rotation [N, H * E]
    k: Tensor  # k projection, before its norm and rotation [N, G * E]
    o: Tensor  # attention output [N, H * E]
    lse: Tensor  # log-sum-exp of the attention scores [H, N], float32
    x2: Tensor  # residual stream between attention and feed-forward [N, D]
    gate_up: Tensor  # [N, 2F]


class ActivationSink(Protocol):
    """Keeps what it needs of the rows [rows] as the tokens from `start` on of a training sequence."""

    def save(self, layer: int, start: int, rows: slice, activations: LayerActivations) -> None: ...


@dataclass(slots=True)
class Capture:
    """Rows whose activations a training sequence keeps."""

    rows: slice
    sink: ActivationSink
    start: int


@dataclass(slots=True)
class WindowPart:
    """A run of rows of one causal sequence: they are the last rows of `keys` in the gathered pages."""

    rows: slice
    keys: slice
    mask: Tensor  # from kernels.attention.causal_mask


@dataclass(slots=True)
class PagedWindow:
    """Rows that read the same block table: one prefill chunk, or a window over packed examples."""

    pages: Tensor
    parts: list[WindowPart]


@dataclass(slots=True)
class PagedDecode:
    """Rows with one query token a sequence, attended together."""

    rows: slice
    pages: Tensor
    mask: Tensor  # from kernels.attention.length_mask


@dataclass(slots=True)
class AdapterRun:
    """Rows [start, end) that use one adapter; in training they are the tokens from `first_token` on."""

    start: int
    end: int
    weights: LoraWeights
    dropout: Dropout | None = None
    first_token: int = 0

    def segment(self, layer: int, group: str, x: Tensor) -> Segment | None:
        """The bypass of one fused linear, whose input is `x` [N, in]; None where the adapter has none."""
        pair = self.weights.layers[layer].get(group)
        if pair is None:
            return None
        mask = None
        if self.dropout is not None:
            tokens = slice(self.first_token, self.first_token + self.end - self.start)
            mask = self.dropout.mask(layer, group, tokens, x[self.start : self.end])
        return Segment(self.start, self.end, *pair, mask)


@dataclass(slots=True)
class ForwardContext:
    """One fused forward over N rows."""

    positions: Tensor  # int64 [N]
    slots: Tensor  # where the rows' keys and values are written, from KVCache.slots
    windows: list[PagedWindow] = field(default_factory=list)
    decode: PagedDecode | None = None
    adapters: list[AdapterRun] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
