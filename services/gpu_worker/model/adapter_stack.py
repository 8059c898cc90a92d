"""Low-rank parts of several adapters as one pair of products, for the few rows of a CPU's decodes.

There a product of few rows costs little more than the call itself, and a call for each adapter and linear adds up to
more than the model's own products. One pair for all of them multiplies each row with everybody's A, strikes out what
is not its own adapter's, and multiplies the rest with everybody's B side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.gpu_worker.kernels.bypass import Moves
from services.gpu_worker.kernels.linear import gains_by_packing, onednn_product, packed
from services.gpu_worker.kernels.lora_stream import Pair
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.peft import GROUPS

BYTES_A_STEP = 4 << 20  # copied between two steps, some milliseconds


class StackedLinear:
    """The pairs of one linear [out, in], in oneDNN's layout."""

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        """Of adapters by number; None where one has none here."""
        there = [pair for pair in pairs if pair is not None]
        self.ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        self._a = packed(torch.cat([a for a, _ in there]))
        self._b = packed(torch.cat([b for _, b in there], 1))

    @property
    def size_bytes(self) -> int:
        return self._a.numel() * self._a.element_size() + self._b.numel() * self._b.element_size()

    def add_(self, y: Tensor, x: Tensor, is_foreign: Tensor) -> None:
        """`y` [N, out] += low-rank parts of `x` [N, in]; `is_foreign` bool [N, sum of ranks] strikes out what other
        adapters make of a row, be it finite or not."""
        low = onednn_product(x, self._a, None).masked_fill_(is_foreign, 0)
        y.add_(onednn_product(low, self._b, None))


class AdapterStack:
    """Copies of what adapters hold, made bit by bit; their values must not change meanwhile."""

    def __init__(self, adapters: Sequence[AdapterWeights]) -> None:
        """Of those that `can_stack`."""
        self.adapters = tuple(adapters)
        self._numbers = {id(weights): number for number, weights in enumerate(self.adapters)}
        num_layers = len(self.adapters[0].layers)
        self._left = [(layer, group) for layer in reversed(range(num_layers)) for group in reversed(GROUPS)]
        self._linears: dict[tuple[int, str], StackedLinear] = {}
        self.size_bytes = 0

    @property
    def is_whole(self) -> bool:
        return not self._left

    def __contains__(self, weights: AdapterWeights) -> bool:
        return id(weights) in self._numbers

    def number(self, weights: AdapterWeights) -> int:
        return self._numbers[id(weights)]

    def grow(self, num_bytes: int) -> None:
        """Copies the next linears, at least one, until about `num_bytes` are done."""
        until = self.size_bytes + num_bytes
        while self._left and self.size_bytes < until:
            layer, group = self._left.pop()
            bypasses = [weights.layers[layer].get(group) for weights in self.adapters]
            pairs = [None if bypass is None else bypass.pair for bypass in bypasses]
            if any(pair is not None for pair in pairs):
                linear = self._linears[layer, group] = StackedLinear(pairs)
                self.size_bytes += linear.size_bytes

    def linear(self, layer: int, group: str) -> StackedLinear | None:
        return self._linears.get((layer, group))


class StackedRows:
    """Rows of a stream whose adapters are stacked, as `owners` says for each: its number, or -1 for none."""

    def __init__(self, stack: AdapterStack, rows: slice, owners: Sequence[int]) -> None:
        self._stack, self._rows = stack, rows
        self._owners = torch.tensor(owners)
        self._foreign: dict[tuple[int, ...], Tensor] = {}  # by the ranks of a linear: most share them

    def add_(self, y: Tensor, x: Tensor, layer: int, group: str) -> None:
        linear = self._stack.linear(layer, group)
        if linear is not None:
            linear.add_(y[self._rows], x[self._rows], self._is_foreign(linear.ranks))

    def _is_foreign(self, ranks: tuple[int, ...]) -> Tensor:
        if ranks not in self._foreign:
            columns = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            self._foreign[ranks] = self._owners[:, None] != columns
        return self._foreign[ranks]


class AdapterStacks:
    """The stack for what is served now. While another is made, the one before serves the adapters that it has."""

    def __init__(self) -> None:
        self._ready: AdapterStack | None = None
        self._growing: AdapterStack | None = None

    @property
    def size_bytes(self) -> int:
        return sum(stack.size_bytes for stack in (self._ready, self._growing) if stack is not None)

    def serve(self, adapters: Sequence[AdapterWeights], num_bytes: int = BYTES_A_STEP) -> AdapterStack | None:
        """Once a step with its different adapters, all of which `can_stack`; goes on with what is not whole."""
        if len(adapters) < 2:
            return None
        if self._growing is None and not self._suits(adapters):
            self._growing = AdapterStack(adapters)
        if self._growing is not None:
            self._growing.grow(num_bytes)
            if self._growing.is_whole:
                self._ready, self._growing = self._growing, None
        return self._ready

    def forget(self, weights: AdapterWeights) -> None:
        """Lets go of stacks that hold an adapter."""
        if self._ready is not None and weights in self._ready:
            self._ready = None
        if self._growing is not None and weights in self._growing:
            self._growing = None

    def _suits(self, adapters: Sequence[AdapterWeights]) -> bool:
        """Rows of few adapters would multiply with too many others'."""
        ready = self._ready
        if ready is None or len(ready.adapters) > 2 * len(adapters):
            return False
        return all(weights in ready for weights in adapters)


def most_copies(device: torch.device, dtype: torch.dtype) -> int:
    """Of each adapter, in the stack that serves and in the one that is being made."""
    return 2 if gains_by_packing(device, dtype) else 0


def can_stack(weights: AdapterWeights) -> bool:
    """Whether copies of its low-rank parts may stand beside others', and would be faster there. A product with zero
    is none with infinity: an adapter that has overflowed stays alone. So does one of several ranks' that moves tensors
    between its products."""
    bypasses = [bypass for layer in weights.layers for bypass in layer.values()]
    pairs = [pair for bypass in bypasses if (pair := bypass.pair) is not None]
    if not pairs or any(bypass.moves != Moves() for bypass in bypasses):
        return False
    return all(
        gains_by_packing(t.device, t.dtype) and bool(t.isfinite().all()) for pair in pairs for t in pair
    )
