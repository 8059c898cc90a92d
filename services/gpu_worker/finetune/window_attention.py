"""Attention of a training window and its gradient, in the form that an engine's kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.gpu_worker.kernels.attention import window_attention
from services.gpu_worker.kernels.attention_backward import window_attention_backward
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.paged_attention import PagedBatch
from services.gpu_worker.model.attention import PagedWindow


class LayerAttention(Protocol):
    """Of a window in one layer; its rows count from 0."""

    def attend(self, q_NHE: Tensor) -> tuple[Tensor, Tensor]:
        """The output [N, H * E] and the log-sum-exp [N, H]."""

    def attend_backward(
        self, do: Tensor, q_NHE: Tensor, o: Tensor, lse: Tensor, dk_GTE: Tensor, dv_GTE: Tensor
    ) -> Tensor:
        """dQ [N, H, E], complete; adds to the sequence's sums over keys and values, float32."""


class WindowAttention(Protocol):
    """Which keys a window's rows read, the same for every layer."""

    @property
    def size_bytes(self) -> int: ...

    def of_layer(self, cache: KVCache, layer: int) -> LayerAttention: ...


@dataclass(slots=True)
class GatheredLayer:
    """`keys`, `values` [G, S, E] are those of the sequence up to the window's end."""

    window: PagedWindow
    keys: Tensor
    values: Tensor

    def attend(self, q_NHE: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            window_attention(q_NHE[p.rows], self.keys[:, p.keys], self.values[:, p.keys], p.mask)
            for p in self.window.parts
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def attend_backward(
        self, do: Tensor, q_NHE: Tensor, o: Tensor, lse: Tensor, dk_GTE: Tensor, dv_GTE: Tensor
    ) -> Tensor:
        dq = torch.empty_like(q_NHE)
        for part in self.window.parts:
            rows, keys = part.rows, part.keys
            dq[rows], dk, dv = window_attention_backward(
                do[rows], q_NHE[rows], self.keys[:, keys], self.values[:, keys], o[rows], lse[rows], part.mask
            )
            dk_GTE[:, keys] += dk
            dv_GTE[:, keys] += dv
        return dq


@dataclass(frozen=True, slots=True)
class GatheredWindow:
    """With masks over gathered pages."""

    window: PagedWindow

    @property
    def size_bytes(self) -> int:
        return self.window.pages.nbytes + sum(part.mask.nbytes for part in self.window.parts)

    def of_layer(self, cache: KVCache, layer: int) -> GatheredLayer:
        return GatheredLayer(self.window, *cache.gather(layer, self.window.pages, 1))


@dataclass(slots=True)
class PagedLayer:
    """`keys`, `values` are the layer's whole cache."""

    batch: PagedBatch
    kernels: Kernels
    keys: Tensor
    values: Tensor

    def attend(self, q_NHE: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.paged_attention(q_NHE, self.keys, self.values, self.batch)

    def attend_backward(
        self, do: Tensor, q_NHE: Tensor, o: Tensor, lse: Tensor, dk_GTE: Tensor, dv_GTE: Tensor
    ) -> Tensor:
        return self.kernels.paged_attention_backward(
            do, q_NHE, self.keys, self.values, o, lse, self.batch, dk_GTE, dv_GTE
        )


@dataclass(frozen=True, slots=True)
class PagedRuns:
    """Over pages where they lie."""

    batch: PagedBatch
    kernels: Kernels

    @property
    def size_bytes(self) -> int:
        return self.batch.columns.nbytes + self.batch.blocks.nbytes

    def of_layer(self, cache: KVCache, layer: int) -> PagedLayer:
        return PagedLayer(self.batch, self.kernels, cache.keys[layer], cache.values[layer])
