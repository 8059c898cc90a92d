"""The methods of parameter-efficient finetuning and where each attaches to the backbone. No tensors.

A method is a set of bypasses: each reads one backbone tensor and adds to, or scales, another. Backbone
operations never change, so tokens of every method share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from services.gpu_worker.model.config import ModelConfig

GROUPS = ("qkv", "o", "gate_up", "down")  # the fused linears of a layer, in the order of the forward
EMBEDDING, HEAD = "embed_tokens", "lm_head"  # LoRA's targets outside the layers
Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "gelu", "silu", "tanh")


class InvalidAdapter(ValueError):
    """The adapter's files or its settings do not fit the base model."""


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
    """Every linear of a layer that a bypass may sit on, by its short name."""
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


def base_label(name: str) -> str:
    """What a projection's output is called before a bypass scales it or reads it."""
    return f"{name}_base"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """y += scaling * B A x (arXiv 2106.09685); with `dora` the sum's rows are rescaled to a learned length
    (arXiv 2402.09353). Targets are linears of the layers, the embedding and the head."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False  # alpha / sqrt(rank), arXiv 2312.03732
    dora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidAdapter(f"rank {self.rank} is not positive")
        if not math.isfinite(self.alpha):
            raise InvalidAdapter(f"lora_alpha {self.alpha} is not a finite number")
        _check_targets(self.targets)
        if self.dora and {EMBEDDING, HEAD} & set(self.targets):
            raise InvalidAdapter("DoRA is for the layers' linears, not for the embedding or the head")


@dataclass(frozen=True, slots=True)
class Ia3Config:
    """y *= l, or x *= l where the target is in `feedforward` (arXiv 2205.05638)."""

    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        _check_targets(self.targets)
        if not set(self.feedforward) <= set(self.targets):
            raise InvalidAdapter("every feedforward module has to be a target module too")
        shared = set(self.feedforward) - {"o_proj", "down_proj"}
        if shared:
            raise InvalidAdapter(
                f"the input of {sorted(shared)[0]!r} is shared; only o_proj's and down_proj's scale"
            )


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """y += scaling * up(act(down(x))): x is the target's output (serial, arXiv 1902.00751) or its input
    (parallel, arXiv 2110.04366)."""

    size: int
    targets: tuple[str, ...] = ("o_proj", "down_proj")
    activation: Activation = "relu"
    scaling: float = 1.0
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidAdapter(f"bottleneck size {self.size} is not positive")
        if self.activation not in ACTIVATIONS:
            raise InvalidAdapter(f"non_linearity {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if not math.isfinite(self.scaling):
            raise InvalidAdapter(f"scaling {self.scaling} is not a finite number")
        _check_targets(self.targets)


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """Learned keys and values in front of every layer's own (arXiv 2101.00190, without reparametrisation)."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        _check_virtual_tokens(self.num_virtual_tokens)


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Learned embeddings in front of the tokens' own (arXiv 2104.08691)."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        _check_virtual_tokens(self.num_virtual_tokens)


Method = LoraConfig | Ia3Config | BottleneckConfig | PrefixConfig | PromptConfig


def trains_head(method: Method) -> bool:
    """Whether the loss itself has gradients to sum."""
    return isinstance(method, LoraConfig) and HEAD in method.targets


def num_virtual_tokens(method: Method) -> int:
    """Positions that the method takes in front of every sequence."""
    return method.num_virtual_tokens if isinstance(method, PrefixConfig | PromptConfig) else 0


def check_method(method: Method, config: ModelConfig) -> None:
    """Raises InvalidAdapter for a target that the model does not have."""
    if isinstance(method, PrefixConfig | PromptConfig):
        return
    known = set(projections(config))
    if isinstance(method, LoraConfig):
        known |= {EMBEDDING, HEAD}
    unknown = set(method.targets) - known
    if unknown:
        raise InvalidAdapter(f"the model has no target {sorted(unknown)[0]!r}")


def _check_targets(targets: tuple[str, ...]) -> None:
    if not targets:
        raise InvalidAdapter("no target modules")
    if len(set(targets)) != len(targets):
        raise InvalidAdapter("a target module is named twice")


def _check_virtual_tokens(number: int) -> None:
    if number < 1:
        raise InvalidAdapter(f"num_virtual_tokens {number} is not positive")
