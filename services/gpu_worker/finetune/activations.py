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

    def layer_bytes(self, dtype: torch.dtype) -> list[int]:
        """Bytes a token, layer by layer."""
        return [
            sum(self.tensors[label].width * self.tensors[label].itemsize(dtype) for label in layer)
            for layer in self.layers
        ]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(self.layer_bytes(dtype))


class ActivationStore:
    """Buffers of `capacity` tokens for every layer, reused from one training sequence to the next.

    Those of the first `num_host_layers` lie in host memory, pinned where the device is a GPU: the backward
    reads the lowest layers last. Windows are copied there when they are saved and back when they are loaded.
    """

    def __init__(
        self,
        reserve: Reserve,
        capacity: int,
        dtype: torch.dtype,
        wide: torch.dtype,
        device: torch.device,
        num_host_layers: int = 0,
    ) -> None:
        self.capacity = capacity
        self.reserve = reserve
        self.device = device
        self.num_host_layers = num_host_layers
        self._dtypes = dtype, wide
        self._buffers = [
            {label: self._make(reserve.tensors[label], layer < num_host_layers) for label in sorted(labels)}
            for layer, labels in enumerate(reserve.layers)
        ]

    def _make(self, kept: KeptTensor, on_host: bool) -> Tensor:
        dtype = self._dtypes[kept.wide]
        if not on_host:
            return torch.empty(self.capacity, kept.width, dtype=dtype, device=self.device)
        return torch.empty(self.capacity, kept.width, dtype=dtype, pin_memory=self.device.type == "cuda")

    @property
    def size_bytes(self) -> int:
        """On the device."""
        return sum(t.nbytes for layer in self._buffers[self.num_host_layers :] for t in layer.values())

    @property
    def host_bytes(self) -> int:
        return sum(t.nbytes for layer in self._buffers[: self.num_host_layers] for t in layer.values())

    def clear(self) -> None:
        """Fills every buffer with zeros."""
        for layer in self._buffers:
            for tensor in layer.values():
                tensor.zero_()

    def move_to_host(self) -> None:
        """Takes the device's buffers to host memory with all that they hold."""
        for layer in range(self.num_host_layers, len(self._buffers)):
            tensors = self.reserve.tensors
            self._buffers[layer] = {
                label: self._make(tensors[label], on_host=True).copy_(held)
                for label, held in self._buffers[layer].items()
            }
        self.num_host_layers = len(self._buffers)

    def save(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        """Keeps rows [n, width] of a forward as the tokens from `start` on, where the layer wants them."""
        buffer = self._buffers[layer].get(name)
        if buffer is not None:
            buffer[start : start + rows.shape[0]].copy_(rows, non_blocking=True)

    def window(self, layer: int, tokens: slice) -> KeptWindow:
        return KeptWindow(self._buffers[layer], tokens, self.device)


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """What a backward program loads: `kept[label]` is [n, width], on the device."""

    buffers: dict[str, Tensor]
    tokens: slice
    device: torch.device

    def __getitem__(self, label: str) -> Tensor | None:
        """Keys and values are in the cache, where the context finds them."""
        if label == "cached":
            return None
        return self.buffers[label][self.tokens].to(self.device, non_blocking=True)
