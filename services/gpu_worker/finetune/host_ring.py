"""Takes layers' activations to host memory and brings them back while the device computes.

Rows pass through a ring of device buffers, a layer's each. A forward leaves its rows there and goes on, while they are
copied from there to the host. A backward finds its layer in the ring, while the layer below comes back from the host
to the place of the layer above. So neither waits where a layer takes as long to compute as to copy.
"""

from __future__ import annotations

from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

Buffers = dict[str, Tensor]  # [capacity, width] by label
Mark = object  # a point in the order of the copies; None: there is nothing to wait for


def ring_depth(num_lanes: int) -> int:
    """Layers that the backward works on at once, and the next."""
    return num_lanes + 1


class CopyStream(Protocol):
    """Copies one after the other, beside what the device computes."""

    def use(self, tensor: Tensor) -> None:
        """The tensor's memory is nobody else's before the copies are done."""

    def follow(self) -> None:
        """Copies from now on come after all that the device was given to compute before."""

    def copy(self, target: Tensor, source: Tensor) -> None: ...

    def mark(self) -> Mark:
        """The end of the copies so far."""

    def wait(self, mark: Mark) -> None:
        """What the device is given to compute from now on comes after the mark."""


class CopiesInTurn:
    """On a CPU a copy is done when the call returns."""

    def use(self, tensor: Tensor) -> None:
        pass

    def follow(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass


class CudaCopies:
    """On a stream beside the one that is current where it is used; the host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def use(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return self._stream.record_event()

    def wait(self, mark: Mark) -> None:
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)


def copy_stream(device: torch.device) -> CopyStream:
    return CudaCopies(device) if device.type == "cuda" else CopiesInTurn()


class HostRing:
    """Of the first layers, whose buffers in host memory are `host`. Up to `depth - 1` neighbouring layers are in the
    backward at once: when one begins, all from the `depth - 1`-th above it on are done."""

    def __init__(self, host: list[Buffers], depth: int, device: torch.device, copies: CopyStream) -> None:
        self._host, self._copies = host, copies
        self._slots = [_union_like(host[slot::depth], device) for slot in range(min(depth, len(host)))]
        self._departures: list[dict[str, Mark]] = [{} for _ in self._slots]
        self._arrivals: list[Mark] = [None for _ in self._slots]
        self._held: list[int | None] = [None for _ in self._slots]  # the layer of which a slot has all rows
        self._lock = Lock()  # lanes load layers at once
        for tensor in self.tensors:
            copies.use(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for slot in self._slots for tensor in slot.values()]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def begin(self) -> None:
        """A sequence's forward through all layers leaves the rows of the last ones in the ring."""
        self._copies.wait(self._copies.mark())  # for layers that came back and were not read
        for layer in range(len(self._host) - len(self._slots), len(self._host)):
            self._held[layer % len(self._slots)] = layer

    def save(self, layer: int, label: str, start: int, rows: Tensor) -> None:
        """Only the device waits, and only where the layer that lay here before is still on its way."""
        index, places = layer % len(self._slots), slice(start, start + rows.shape[0])
        staged = self._slots[index][label][places]
        self._copies.wait(self._departures[index].get(label))
        staged.copy_(rows)
        self._copies.follow()
        self._copies.copy(self._host[layer][label][places], staged)
        self._departures[index][label] = self._copies.mark()

    def load(self, layer: int, num_tokens: int) -> Buffers:
        """The first `num_tokens` rows of a layer, until `depth - 1` layers below it has been loaded."""
        with self._lock:
            self._bring_back(layer, num_tokens)
            if layer > 0:
                self._bring_back(layer - 1, num_tokens)
            index = layer % len(self._slots)
            self._copies.wait(self._arrivals[index])
            return self._slots[index]

    def _bring_back(self, layer: int, num_tokens: int) -> None:
        index = layer % len(self._slots)
        if self._held[index] == layer:
            return
        self._copies.follow()  # what lies there has been read by then
        for label, kept in self._host[layer].items():
            self._copies.copy(self._slots[index][label][:num_tokens], kept[:num_tokens])
        self._arrivals[index], self._held[index] = self._copies.mark(), layer


def _union_like(layers: list[Buffers], device: torch.device) -> Buffers:
    """Buffers on the device that have room for each of the layers."""
    return {label: torch.empty_like(kept, device=device) for layer in layers for label, kept in layer.items()}
