"""Loading a Hugging Face checkpoint, or a rank's part of it, into fused, frozen tensors on the device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.kernels.linear import DenseLinear, FrozenLinear
from services.gpu_worker.model.config import ModelConfig, RopeConfig, UnsupportedModel
from services.gpu_worker.model.parallel import ALONE, Group, read_shard, shard_config
from services.gpu_worker.model.peft import GROUPS


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. q, k, v are one matrix; so are gate and up."""

    input_norm: Tensor  # [D]
    qkv: FrozenLinear  # [(H + 2G) * E, D]
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None
    o: FrozenLinear  # [D, H * E]
    post_norm: Tensor
    gate_up: FrozenLinear  # [2F, D]
    down: FrozenLinear  # [D, F]

    def linear(self, group: str) -> FrozenLinear:
        """One of qkv, o, gate_up, down."""
        found: FrozenLinear = getattr(self, group)
        return found


@dataclass(slots=True)
class ModelWeights:
    """Of one rank. Of the layers' linears it holds its part; embedding, head and norms every rank has whole."""

    config: ModelConfig  # the rank's heads and features of the feed-forward layer; all else as in `whole`
    whole: ModelConfig
    embedding: Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor
    head: FrozenLinear  # [V, D]; of the embedding itself when tied
    inverse_frequencies: Tensor  # float32 [E / 2]
    group: Group = ALONE
    kernels: Kernels = TORCH  # that compute with them

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def size_bytes(self) -> int:
        """Everything that is resident, oneDNN's second layout included."""
        shared = _bytes(self.head.dense()) if self.config.tied_embeddings else 0
        layers = sum(layer.linear(group).size_bytes for layer in self.layers for group in GROUPS)
        norms = sum(
            _bytes(layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm) for layer in self.layers
        )
        return _bytes(self.embedding, self.norm) + self.head.size_bytes - shared + layers + norms


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


Fetch = Callable[[str], Tensor]
MakeLinear = Callable[[Tensor, Tensor | None], FrozenLinear]  # of a weight and a bias


def load_weights(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    make: MakeLinear = DenseLinear,
    group: Group = ALONE,
    kernels: Kernels = TORCH,
) -> ModelWeights:
    """Reads `model.safetensors` or its shards, of divided tensors only the rank's part; raises UnsupportedModel
    naming a tensor that is missing, or what the group's ranks cannot share evenly.

    `make` gives the layers' linears their form one by one, so that no two are dense at once where it quantises.
    """
    config = ModelConfig.from_folder(folder)
    shard_config(config, group.size)  # refused before anything is read
    files = _tensor_files(folder)
    handles = {file: safe_open(folder / file, framework="pt") for file in set(files.values())}

    def fetch(name: str) -> Tensor:
        if name not in files:
            raise UnsupportedModel(f"{folder}: no tensor {name!r} in the checkpoint")
        tensor = read_shard(handles[files[name]], name, config, group.rank, group.size)
        return tensor.to(device=device, dtype=dtype, copy=True)  # else it keeps the whole file mapped

    return build_weights(config, fetch, make, group, kernels)


def build_weights(
    config: ModelConfig,
    fetch: Fetch,
    make: MakeLinear = DenseLinear,
    group: Group = ALONE,
    kernels: Kernels = TORCH,
) -> ModelWeights:
    """`config` is the whole model's; `fetch` gives the rank's part of a tensor by its Hugging Face name, in the
    dtype and on the device to compute with.

    Embedding and head stay dense.
    """
    embedding = fetch("model.embed_tokens.weight")
    return ModelWeights(
        config=shard_config(config, group.size),
        whole=config,
        embedding=embedding,
        layers=[_layer(config, fetch, make, f"model.layers.{i}.") for i in range(config.num_layers)],
        norm=fetch("model.norm.weight"),
        head=DenseLinear(embedding if config.tied_embeddings else fetch("lm_head.weight")),
        inverse_frequencies=inverse_frequencies(config.rope, config.head_dim).to(embedding.device),
        group=group,
        kernels=kernels,
    )


def _layer(config: ModelConfig, fetch: Fetch, make: MakeLinear, prefix: str) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

    def linear(*names: str, bias: bool = False) -> FrozenLinear:
        weights = torch.cat([fetch(f"{name}.weight") for name in names])
        biases = torch.cat([fetch(f"{name}.bias") for name in names]) if bias else None
        try:
            return make(weights, biases)
        except ValueError as error:
            raise UnsupportedModel(f"{' + '.join(names)}: {error}") from error

    return LayerWeights(
        input_norm=fetch(prefix + "input_layernorm.weight"),
        qkv=linear(*(f"{attention}{p}_proj" for p in "qkv"), bias=config.qkv_bias),
        q_norm=fetch(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm=fetch(attention + "k_norm.weight") if config.qk_norm else None,
        o=linear(attention + "o_proj"),
        post_norm=fetch(prefix + "post_attention_layernorm.weight"),
        gate_up=linear(mlp + "gate_proj", mlp + "up_proj"),
        down=linear(mlp + "down_proj"),
    )


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    single = folder / "model.safetensors"
    if not single.exists():
        raise UnsupportedModel(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single.name)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Rotation per position of each pair of features, float32 [head_dim / 2].

    The llama3 form stretches wavelengths beyond the original context by `factor` and blends in between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "default":
        return frequencies
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelength > low, frequencies / rope.factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, stretched)
