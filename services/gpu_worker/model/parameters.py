"""The trainable tensors of each PEFT method: their names, shapes, order and start. No weights are held here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.peft import (
    EMBEDDING,
    GROUPS,
    HEAD,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    Projection,
    PromptConfig,
    projections,
)

STEM = "base_model.model.model"
Key = tuple[int | None, str]  # of a Parameter: (layer, key)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trainable tensor: `key` is `<module>.<role>`, unique within its layer (None: outside the layers)."""

    layer: int | None
    key: str
    shape: tuple[int, ...]
    file_name: str  # in PEFT's adapter_model.safetensors
    file_shape: tuple[int, ...]  # there

    @property
    def place(self) -> Key:
        return self.layer, self.key

    @property
    def module(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def role(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parameters(config: ModelConfig, method: Method) -> list[Parameter]:
    """In the order in which a job's flat master holds them: a fused linear's A's stand one after the other."""
    if isinstance(method, LoraConfig):
        return list(_lora(config, method))
    if isinstance(method, Ia3Config):
        return list(_ia3(config, method))
    if isinstance(method, BottleneckConfig):
        return list(_bottleneck(config, method))
    width = config.hidden_size
    if isinstance(method, PrefixConfig):
        width = 2 * config.num_layers * config.kv_size
    shape = method.num_virtual_tokens, width
    return [Parameter(None, _virtual_key(method), shape, "prompt_embeddings", shape)]


def _virtual_key(method: PrefixConfig | PromptConfig) -> str:
    return "prefix.rows" if isinstance(method, PrefixConfig) else "prompt.rows"


def _targets(config: ModelConfig, targets: tuple[str, ...]) -> Iterator[tuple[int, list[Projection]]]:
    """(layer, the targets of one fused linear), in the order of the forward."""
    known = [p for p in projections(config).values() if p.name in targets]
    for layer in range(config.num_layers):
        for group in GROUPS:
            yield layer, [p for p in known if p.group == group]


def _lora(config: ModelConfig, lora: LoraConfig) -> Iterator[Parameter]:
    for layer, members in _targets(config, lora.targets):
        for p in members:
            yield _named(layer, p, "a", (lora.rank, p.in_features), "lora_A.weight")
        for p in members:
            yield _named(layer, p, "b", (p.out_features, lora.rank), "lora_B.weight")
        for p in members if lora.dora else ():
            yield _named(layer, p, "magnitude", (p.out_features,), "lora_magnitude_vector")
    vocab, width = config.vocab_size, config.hidden_size
    if EMBEDDING in lora.targets:
        a, b = (lora.rank, vocab), (width, lora.rank)
        yield Parameter(None, f"{EMBEDDING}.a", a, f"{STEM}.{EMBEDDING}.lora_embedding_A", a)
        yield Parameter(None, f"{EMBEDDING}.b", b, f"{STEM}.{EMBEDDING}.lora_embedding_B", b)
    if HEAD in lora.targets:
        a, b = (lora.rank, width), (vocab, lora.rank)
        yield Parameter(None, f"{HEAD}.a", a, f"base_model.model.{HEAD}.lora_A.weight", a)
        yield Parameter(None, f"{HEAD}.b", b, f"base_model.model.{HEAD}.lora_B.weight", b)


def _ia3(config: ModelConfig, ia3: Ia3Config) -> Iterator[Parameter]:
    for layer, members in _targets(config, ia3.targets):
        for p in members:
            if p.name in ia3.feedforward:
                yield _named(layer, p, "input_scale", (p.in_features,), "ia3_l", (1, p.in_features))
            else:
                yield _named(layer, p, "scale", (p.out_features,), "ia3_l", (p.out_features, 1))


def _bottleneck(config: ModelConfig, method: BottleneckConfig) -> Iterator[Parameter]:
    for layer, members in _targets(config, method.targets):
        for p in members:
            width = p.in_features if method.parallel else p.out_features
            yield _named(layer, p, "down_w", (method.size, width), "adapter_down.weight")
            yield _named(layer, p, "down_b", (method.size,), "adapter_down.bias")
            yield _named(layer, p, "up_w", (p.out_features, method.size), "adapter_up.weight")
            yield _named(layer, p, "up_b", (p.out_features,), "adapter_up.bias")


def _named(
    layer: int,
    projection: Projection,
    role: str,
    shape: tuple[int, ...],
    suffix: str,
    file_shape: tuple[int, ...] | None = None,
) -> Parameter:
    name = f"{STEM}.layers.{layer}.{projection.path}.{suffix}"
    return Parameter(layer, f"{projection.name}.{role}", shape, name, file_shape or shape)


def initial(parameter: Parameter, generator: torch.Generator, embedding: Tensor) -> Tensor:
    """Where training starts, float32 on the CPU: with nothing that changes the base model, except for prompts
    (rows of the vocabulary, as arXiv 2104.08691 found best) and prefixes (small values).

    A magnitude has no start of its own: it is the length of the weight's rows, which the caller knows.
    """
    shape, role = parameter.shape, parameter.role
    if parameter.key == "prompt.rows":
        chosen = torch.randint(embedding.shape[0], shape[:1], generator=generator)
        return embedding[chosen.to(embedding.device)].float().cpu()
    value = torch.empty(shape, dtype=torch.float32)
    if parameter.key == "prefix.rows":
        return value.normal_(0.0, 0.02, generator=generator)
    if parameter.key == f"{EMBEDDING}.b":  # PEFT's choice for embeddings: A zero, B normal
        return value.normal_(generator=generator)
    if role in ("scale", "input_scale"):
        return value.fill_(1.0)
    if parameter.key == f"{EMBEDDING}.a" or role not in ("a", "down_w"):
        return value.zero_()
    bound = 1 / math.sqrt(shape[1])  # PEFT's: Kaiming uniform with a = sqrt(5)
    return value.uniform_(-bound, bound, generator=generator)
