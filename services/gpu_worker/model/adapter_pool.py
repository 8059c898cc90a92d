"""Adapters that requests may use, as many as there are places for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.gpu_worker.model.adapter_stack import AdapterStack, AdapterStacks, can_stack
from services.gpu_worker.model.adapters import AdapterWeights


@dataclass(slots=True)
class _Slot:
    weights: AdapterWeights
    is_stackable: bool
    pins: int = 0


@dataclass(slots=True)
class AdapterPool:
    """Adapters by content digest. Pinned ones stay; of the others the least recently used leaves first."""

    capacity: int
    _slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)
    _stacks: AdapterStacks = field(default_factory=AdapterStacks)

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def size_bytes(self) -> int:
        return sum(slot.weights.size_bytes for slot in self._slots.values()) + self._stacks.size_bytes

    def can_load(self) -> bool:
        return len(self._slots) < self.capacity or any(not slot.pins for slot in self._slots.values())

    def load(self, digest: str, weights: AdapterWeights) -> None:
        """Makes an adapter available; evicts an unpinned one when full. Requires `can_load()`."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return
        if len(self._slots) >= self.capacity:
            victim = next(d for d, slot in self._slots.items() if not slot.pins)
            self._stacks.forget(self._slots.pop(victim).weights)
        self._slots[digest] = _Slot(weights, can_stack(weights))

    def get(self, digest: str) -> AdapterWeights:
        return self._slots[digest].weights

    def pin(self, digest: str) -> None:
        self._slots[digest].pins += 1
        self._slots.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        self._slots[digest].pins -= 1

    def stack(self, adapters: Iterable[AdapterWeights]) -> AdapterStack | None:
        """What serves those of a step's adapters that are here and in it; None where one by one is as good."""
        stackable = {id(slot.weights): slot.weights for slot in self._slots.values() if slot.is_stackable}
        return self._stacks.serve(
            [stackable[key] for key in {id(w): w for w in adapters} if key in stackable]
        )
