"""Adapters as Hugging Face PEFT's two files, both ways, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from services.gpu_worker.model.adapters import (
    InvalidAdapter,
    LoraConfig,
    LoraWeights,
    Projection,
    projections,
)
from services.gpu_worker.model.config import ModelConfig

# Settings that do not change what a saved LoRA computes; any other that is set is refused.
NEUTRAL_SETTINGS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "parent_library",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "unsloth_fixed",
        "use_rslora",
    )
)
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others changed the base model
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def config_from_peft(config: Mapping[str, Any], known: Sequence[str]) -> LoraConfig:
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
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not isinstance(alpha, (int, float)):
        raise InvalidAdapter(f"r {rank!r} and lora_alpha {alpha!r} must be numbers")
    if not isinstance(targets, list) or any(name not in known for name in targets):
        raise InvalidAdapter(f"target_modules must be a list out of {', '.join(known)}")
    in_order = tuple(name for name in known if name in targets)
    return LoraConfig(rank, float(alpha), in_order, rslora=bool(config.get("use_rslora", False)))


def config_to_peft(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


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
    lora = config_from_peft(_settings(files), tuple(projections(config)))
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
        "adapter_config.json": json.dumps(
            config_to_peft(lora, base_model), indent=2, sort_keys=True
        ).encode(),
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
