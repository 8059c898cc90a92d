"""The reserved activations of one training sequence: what the backward reads and does not compute again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import KeptTensor


@dataclass(frozen=True, slots=True)
class Reserve:
    """What is kept of each layer, by label."""

    tensors: dict[str, KeptTensor]
    layers: tuple[frozenset[str], ...]

    @property
    def labels(self) -> frozenset[str]:
        return frozenset().union(*self.layers)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(
            self.tensors[label].width * self.tensors[label].itemsize(dtype)
            for layer in self.layers
            for label in layer
        )


class ActivationStore:
    """Buffers of `capacity` tokens for every layer, reused from one training sequence to the next."""

    def __init__(
        self, reserve: Reserve, capacity: int, dtype: torch.dtype, wide: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.reserve = reserve
        self._buffers = [
            {label: self._make(reserve.tensors[label], dtype, wide, device) for label in sorted(labels)}
            for labels in reserve.layers
        ]

    def _make(self, kept: KeptTensor, dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self.capacity, kept.width, dtype=wide if kept.wide else dtype, device=device)

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self._buffers for t in layer.values())

    def clear(self) -> None:
        """Fills every buffer with zeros."""
        for layer in self._buffers:
            for tensor in layer.values():
                tensor.zero_()

    def save(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        """Keeps rows [n, width] of a forward as the tokens from `start` on, where the layer wants them."""
        buffer = self._buffers[layer].get(name)
        if buffer is not None:
            buffer[start : start + rows.shape[0]].copy_(rows)

    def window(self, layer: int, tokens: slice) -> KeptWindow:
        return KeptWindow(self._buffers[layer], tokens)


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """What a backward program loads: `kept[label]` is [n, width]."""

    buffers: dict[str, Tensor]
    tokens: slice

    def __getitem__(self, label: str) -> Tensor | None:
        """Keys and values are in the cache, where the context finds them."""
        return None if label == "cached" else self.buffers[label][self.tokens]
