"""The reserved activations of one training sequence: what the backward reads and does not compute again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import KeptTensor
from services.gpu_worker.finetune.host_ring import Buffers, CopyStream, HostRing


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
        return [self._bytes(layer, dtype) for layer in self.layers]

    def _bytes(self, labels: frozenset[str], dtype: torch.dtype) -> int:
        return sum(self.tensors[label].width * self.tensors[label].itemsize(dtype) for label in labels)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return sum(self.layer_bytes(dtype))

    def ring_bytes(self, dtype: torch.dtype, num_host_layers: int, depth: int) -> int:
        """Bytes a token of a HostRing for the first `num_host_layers`."""
        host = self.layers[:num_host_layers]
        slots = [frozenset().union(*host[slot::depth]) for slot in range(min(depth, num_host_layers))]
        return sum(self._bytes(labels, dtype) for labels in slots)


class ActivationStore:
    """Buffers of `capacity` tokens for every layer, reused from one training sequence to the next.

    Those of the first `num_host_layers` lie in host memory, pinned where the device is a GPU: the backward reads the
    lowest layers last. A ring of `ring_depth` layers on the device is between them and what computes.
    """

    def __init__(
        self,
        reserve: Reserve,
        capacity: int,
        dtype: torch.dtype,
        wide: torch.dtype,
        device: torch.device,
        copies: CopyStream,
        num_host_layers: int = 0,
        ring_depth: int = 2,
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
        self._num_tokens = capacity  # of the sequence in hand
        self._ring_depth, self._copies = ring_depth, copies
        self._ring = self._make_ring()

    def _make(self, kept: KeptTensor, on_host: bool) -> Tensor:
        dtype = self._dtypes[kept.wide]
        if not on_host:
            return torch.empty(self.capacity, kept.width, dtype=dtype, device=self.device)
        return torch.empty(self.capacity, kept.width, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _make_ring(self) -> HostRing:
        return HostRing(self._host, self._ring_depth, self.device, self._copies)

    @property
    def _host(self) -> list[Buffers]:
        return self._buffers[: self.num_host_layers]

    @property
    def size_bytes(self) -> int:
        """On the device."""
        layers = self._buffers[self.num_host_layers :]
        return self._ring.size_bytes + sum(t.nbytes for layer in layers for t in layer.values())

    @property
    def host_bytes(self) -> int:
        return sum(t.nbytes for layer in self._host for t in layer.values())

    def clear(self) -> None:
        """Fills every buffer with zeros."""
        for tensor in (*self._ring.tensors, *(t for layer in self._buffers for t in layer.values())):
            tensor.zero_()

    def move_to_host(self) -> None:
        """Takes the device's buffers to host memory with all that they hold."""
        for layer in range(self.num_host_layers, len(self._buffers)):
            tensors = self.reserve.tensors
            self._buffers[layer] = {
                label: self._make(tensors[label], on_host=True).copy_(held)
                for label, held in self._buffers[layer].items()
            }
        if self.num_host_layers < len(self._buffers):
            self.num_host_layers = len(self._buffers)
            self._ring = self._make_ring()

    def begin(self, num_tokens: int) -> None:
        """Before the forward of a sequence."""
        self._num_tokens = num_tokens
        self._ring.begin()

    def save(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        """Keeps rows [n, width] of a forward as the tokens from `start` on, where the layer wants them."""
        buffer = self._buffers[layer].get(name)
        if buffer is None:
            return
        if layer < self.num_host_layers:
            self._ring.save(layer, name, start, rows)
        else:
            buffer[start : start + rows.shape[0]].copy_(rows)

    def window(self, layer: int, tokens: slice) -> KeptWindow:
        """Of the layer that the backward is at; windows and layers come from the last to the first."""
        on_host = layer < self.num_host_layers
        buffers = self._ring.load(layer, self._num_tokens) if on_host else self._buffers[layer]
        return KeptWindow(buffers, tokens)


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """What a backward program loads: `kept[label]` is [n, width], on the device."""

    buffers: Buffers
    tokens: slice

    def __getitem__(self, label: str) -> Tensor | None:
        """Keys and values are in the cache, where the context finds them."""
        return None if label == "cached" else self.buffers[label][self.tokens]
