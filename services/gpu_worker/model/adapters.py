"""LoRA adapters on the device: many at once, of any rank and any choice of targets."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.config import ModelConfig

GROUPS = ("qkv", "o", "gate_up", "down")  # the fused linears of a layer, in the order of the forward


class InvalidAdapter(ValueError):
    """The adapter's files do not fit the base model."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear that a checkpoint names, as rows of a fused one."""

    name: str  # q_proj ... down_proj
    path: str  # under `model.layers.<i>.`
    group: str
    rows: slice  # of the fused linear's output
    in_features: int

    @property
    def out_features(self) -> int:
        return int(self.rows.stop - self.rows.start)


def projections(config: ModelConfig) -> dict[str, Projection]:
    """Every linear that a LoRA may sit on, by its short name."""
    d, q, kv, f = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    rows = [
        ("q_proj", "self_attn.q_proj", "qkv", slice(0, q), d),
        ("k_proj", "self_attn.k_proj", "qkv", slice(q, q + kv), d),
        ("v_proj", "self_attn.v_proj", "qkv", slice(q + kv, q + 2 * kv), d),
        ("o_proj", "self_attn.o_proj", "o", slice(0, d), q),
        ("gate_proj", "mlp.gate_proj", "gate_up", slice(0, f), d),
        ("up_proj", "mlp.up_proj", "gate_up", slice(f, 2 * f), d),
        ("down_proj", "mlp.down_proj", "down", slice(0, d), f),
    ]
    return {row[0]: Projection(*row) for row in rows}


def group_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) features of each fused linear."""
    d, q, kv, f = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    return {"qkv": (q + 2 * kv, d), "o": (d, q), "gate_up": (2 * f, d), "down": (d, f)}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidAdapter(f"rank {self.rank} is not positive")
        if not math.isfinite(self.alpha):
            raise InvalidAdapter(f"lora_alpha {self.alpha} is not a finite number")
        if not self.targets:
            raise InvalidAdapter("no target modules")


class LoraWeights:
    """One adapter in the layout that the layers compute with.

    `layers[i][group]` is the pair A [R, in] (the group's projections stacked) and B [out, R] (block-diagonal,
    scaling included), or is absent where no projection of the group is a target.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        unknown = set(lora.targets) - projections(config).keys()
        if unknown:
            raise InvalidAdapter(f"the model has no target {sorted(unknown)[0]!r}")
        self.config = lora
        self.blocks: dict[str, tuple[Projection, slice]] = {}  # target -> where, and its columns of the stack
        stacked: dict[str, int] = {}
        for name, projection in projections(config).items():
            if name in lora.targets:
                start = stacked.get(projection.group, 0)
                stacked[projection.group] = start + lora.rank
                self.blocks[name] = (projection, slice(start, start + lora.rank))
        sizes = group_sizes(config)
        self.layers: list[dict[str, tuple[Tensor, Tensor]]] = [
            {
                group: (
                    torch.zeros(rank, sizes[group][1], dtype=dtype, device=device),
                    torch.zeros(sizes[group][0], rank, dtype=dtype, device=device),
                )
                for group, rank in stacked.items()
            }
            for _ in range(config.num_layers)
        ]

    def set(self, layer: int, target: str, a: Tensor, b: Tensor) -> None:
        """Copies one projection's A [r, in] and unscaled B [out, r] into place."""
        projection, columns = self.blocks[target]
        stacked_a, stacked_b = self.layers[layer][projection.group]
        stacked_a[columns].copy_(a)
        stacked_b[projection.rows, columns].copy_(b.to(accumulation_dtype(b.dtype)) * self.config.scaling)

    @property
    def size_bytes(self) -> int:
        pairs = (pair for layer in self.layers for pair in layer.values())
        return sum(t.numel() * t.element_size() for pair in pairs for t in pair)


@dataclass(slots=True)
class _Slot:
    weights: LoraWeights
    pins: int = 0


@dataclass(slots=True)
class AdapterPool:
    """Adapters by content digest. Pinned ones stay; of the others the least recently used leaves first."""

    capacity: int
    _slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def size_bytes(self) -> int:
        return sum(slot.weights.size_bytes for slot in self._slots.values())

    def can_load(self) -> bool:
        return len(self._slots) < self.capacity or any(not slot.pins for slot in self._slots.values())

    def load(self, digest: str, weights: LoraWeights) -> None:
        """Makes an adapter available; evicts an unpinned one when full. Requires `can_load()`."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return
        if len(self._slots) >= self.capacity:
            victim = next(d for d, slot in self._slots.items() if not slot.pins)
            del self._slots[victim]
        self._slots[digest] = _Slot(weights)

    def get(self, digest: str) -> LoraWeights:
        return self._slots[digest].weights

    def pin(self, digest: str) -> None:
        self._slots[digest].pins += 1
        self._slots.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        self._slots[digest].pins -= 1
