"""LoRA adapters on the device: many at once, of any rank and any choice of targets."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.config import ModelConfig

# Settings of PEFT that do not change what a saved LoRA computes; any other that is set is refused.
NEUTRAL_SETTINGS = frozenset(
    "peft_type peft_version task_type base_model_name_or_path revision auto_mapping parent_library inference_mode "
    "r lora_alpha lora_dropout target_modules exclude_modules layers_pattern use_rslora bias init_lora_weights "
    "loftq_config eva_config corda_config lora_ga_config megatron_config megatron_core qalora_group_size "
    "runtime_config ensure_weight_tying unsloth_fixed".split()
)
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others changed the base model
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], known: Sequence[str]) -> LoraConfig:
        """Reads `adapter_config.json`; raises InvalidAdapter for anything that we would compute differently."""
        if config.get("peft_type") != "LORA":
            raise InvalidAdapter(f"peft_type {config.get('peft_type')!r}: only LORA")
        for key, value in config.items():
            if value and key not in NEUTRAL_SETTINGS:
                raise InvalidAdapter(f"{key} is not supported")
        if config.get("bias", "none") != "none":
            raise InvalidAdapter(f"bias {config['bias']!r}: only 'none'")
        if config.get("init_lora_weights") not in NEUTRAL_INITS:
            raise InvalidAdapter(f"init_lora_weights {config['init_lora_weights']!r} changes the base model")
        rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
        if type(rank) is not int or type(alpha) not in (int, float):
            raise InvalidAdapter(f"r {rank!r} and lora_alpha {alpha!r} must be numbers")
        if not isinstance(targets, list) or any(name not in known for name in targets):
            raise InvalidAdapter(f"target_modules must be a list out of {', '.join(known)}")
        in_order = tuple(name for name in known if name in targets)
        return cls(rank, float(alpha), in_order, rslora=bool(config.get("use_rslora", False)))

    def to_peft(self, base_model: str) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "lora_dropout": 0.0,
            "use_rslora": self.rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
        }


class LoraWeights:
    """One adapter in the layout that the layers compute with.

    `layers[i][group]` is the pair A [R, in] (the group's projections stacked) and B [out, R] (block-diagonal,
    scaling included), or is absent where no projection of the group is a target.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
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


def tensor_names(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[int, Projection, str, str]]:
    """(layer, projection, name of A, name of B) in Hugging Face PEFT's files."""
    known = projections(config)
    for layer in range(config.num_layers):
        for target in lora.targets:
            stem = f"base_model.model.model.layers.{layer}.{known[target].path}"
            yield layer, known[target], f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def read_peft(
    config: ModelConfig, files: Mapping[str, bytes], max_rank: int, dtype: torch.dtype, device: torch.device
) -> LoraWeights:
    """An adapter from PEFT's two files. Names, shapes and finiteness are checked before anything is used."""
    lora = LoraConfig.from_peft(_settings(files), tuple(projections(config)))
    if lora.rank > max_rank:
        raise InvalidAdapter(f"rank {lora.rank} exceeds {max_rank}")
    tensors = _tensors(files)
    weights = LoraWeights(config, lora, dtype, device)
    for layer, projection, name_a, name_b in tensor_names(config, lora):
        a = _checked(tensors, name_a, (lora.rank, projection.in_features))
        b = _checked(tensors, name_b, (projection.out_features, lora.rank))
        weights.set(layer, projection.name, a.to(device), b.to(device))
    if tensors:
        raise InvalidAdapter(f"unexpected tensor {sorted(tensors)[0]!r}")
    return weights


def write_peft(
    config: ModelConfig,
    lora: LoraConfig,
    base_model: str,
    tensors: Mapping[tuple[int, str], tuple[Tensor, Tensor]],
) -> dict[str, bytes]:
    """PEFT's two files from each (layer, target)'s A [r, in] and B [out, r]."""
    named: dict[str, Tensor] = {}
    for layer, projection, name_a, name_b in tensor_names(config, lora):
        a, b = tensors[layer, projection.name]
        named[name_a], named[name_b] = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return {
        "adapter_config.json": json.dumps(lora.to_peft(base_model), indent=2, sort_keys=True).encode(),
        "adapter_model.safetensors": save_safetensors(named, metadata={"format": "pt"}),
    }


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        settings = json.loads(files["adapter_config.json"])
    except (KeyError, ValueError, RecursionError) as error:
        raise InvalidAdapter(f"adapter_config.json cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidAdapter("adapter_config.json holds no object")
    return settings


def _tensors(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_safetensors(files["adapter_model.safetensors"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise InvalidAdapter(f"adapter_model.safetensors cannot be read: {error}") from error
    return tensors


def _checked(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise InvalidAdapter(f"no tensor {name!r}")
    if tuple(tensor.shape) != shape:
        raise InvalidAdapter(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in FLOATS:
        raise InvalidAdapter(f"{name} is of {tensor.dtype}, not of floating point")
    if not torch.isfinite(tensor).all():
        raise InvalidAdapter(f"{name} holds values that are not finite")
    return tensor


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
