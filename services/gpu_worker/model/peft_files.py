"""Adapters as Hugging Face PEFT's two files, both ways, unchanged. PEFT has no bottleneck adapters: their files
are of the same form, with `peft_type` BOTTLENECK."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parameters import Key, parameters
from services.gpu_worker.model.peft import (
    EMBEDDING,
    HEAD,
    BottleneckConfig,
    Ia3Config,
    InvalidAdapter,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
    check_method,
    num_virtual_tokens,
    projections,
)
from services.gpu_worker.model.weights import ModelWeights

# Settings that say nothing about what a saved adapter computes, or that a reader below looks at; any other
# that is set is refused.
COMMON = ("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "parent_library",
          "peft_type", "peft_version", "revision", "target_modules", "task_type")  # fmt: skip
OF_LORA = ("bias", "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "layers_pattern",
           "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
           "qalora_group_size", "r", "runtime_config", "unsloth_fixed", "use_dora", "use_rslora")  # fmt: skip
OF_VIRTUAL = ("encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers",
              "num_transformer_submodules", "num_virtual_tokens", "prompt_tuning_init",
              "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs",
              "tokenizer_name_or_path")  # fmt: skip
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others changed the base model
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_VIRTUAL_TOKENS = 4096
MAX_BOTTLENECK = 4096


def method_from_peft(config: Mapping[str, Any], model: ModelConfig) -> Method:
    """Reads `adapter_config.json`; raises InvalidAdapter for anything that we would compute differently."""
    kind = config.get("peft_type")
    readers: dict[Any, tuple[Sequence[str], Callable[[Mapping[str, Any], ModelConfig], Method]]] = {
        "LORA": (OF_LORA, _read_lora),
        "IA3": (("feedforward_modules", "init_ia3_weights"), _read_ia3),
        "PREFIX_TUNING": (OF_VIRTUAL, lambda config, model: PrefixConfig(_virtual_tokens(config))),
        "PROMPT_TUNING": (OF_VIRTUAL, lambda config, model: PromptConfig(_virtual_tokens(config))),
        "BOTTLENECK": (
            ("bottleneck_size", "non_linearity", "scaling", "use_parallel_adapter"),
            _read_bottleneck,
        ),
    }
    if kind not in readers:
        raise InvalidAdapter(f"peft_type {kind!r} is not one of {', '.join(readers)}")
    own, read = readers[kind]
    for key, value in config.items():
        if value and key not in (*COMMON, *own):
            raise InvalidAdapter(f"{key} is not supported")
    method = read(config, model)
    check_method(method, model)
    return method


def _read_lora(config: Mapping[str, Any], model: ModelConfig) -> LoraConfig:
    if config.get("bias", "none") != "none":
        raise InvalidAdapter(f"bias {config['bias']!r}: only 'none'")
    if config.get("init_lora_weights") not in NEUTRAL_INITS:
        raise InvalidAdapter(f"init_lora_weights {config['init_lora_weights']!r} changes the base model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, (int, float)):
        raise InvalidAdapter(f"r {rank!r} and lora_alpha {alpha!r} must be numbers")
    return LoraConfig(
        rank,
        float(alpha),
        _modules(config, "target_modules", [*projections(model), EMBEDDING, HEAD]),
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
    )


def _read_ia3(config: Mapping[str, Any], model: ModelConfig) -> Ia3Config:
    known = list(projections(model))
    return Ia3Config(
        _modules(config, "target_modules", known), _modules(config, "feedforward_modules", known)
    )


def _read_bottleneck(config: Mapping[str, Any], model: ModelConfig) -> BottleneckConfig:
    size, scaling = config.get("bottleneck_size"), config.get("scaling", 1.0)
    if type(size) is not int or size > MAX_BOTTLENECK or not isinstance(scaling, (int, float)):
        raise InvalidAdapter(
            f"bottleneck_size {size!r} (at most {MAX_BOTTLENECK}) and scaling {scaling!r}: numbers"
        )
    return BottleneckConfig(
        size,
        _modules(config, "target_modules", list(projections(model))),
        config.get("non_linearity", "relu"),
        float(scaling),
        bool(config.get("use_parallel_adapter", False)),
    )


def _modules(config: Mapping[str, Any], key: str, known: list[str]) -> tuple[str, ...]:
    names = config.get(key)
    if not isinstance(names, list) or any(name not in known for name in names):
        raise InvalidAdapter(f"{key} must be a list out of {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _virtual_tokens(config: Mapping[str, Any]) -> int:
    number = config.get("num_virtual_tokens")
    if type(number) is not int or number > MAX_VIRTUAL_TOKENS:
        raise InvalidAdapter(f"num_virtual_tokens {number!r} must be a number up to {MAX_VIRTUAL_TOKENS}")
    return number


def method_to_peft(method: Method, model: ModelConfig, base_model: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    if isinstance(method, LoraConfig):
        return common | {
            "peft_type": "LORA",
            "r": method.rank,
            "lora_alpha": method.alpha,
            "target_modules": list(method.targets),
            "lora_dropout": 0.0,
            "use_rslora": method.rslora,
            "use_dora": method.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
    if isinstance(method, Ia3Config):
        return common | {
            "peft_type": "IA3",
            "target_modules": list(method.targets),
            "feedforward_modules": list(method.feedforward),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
            "modules_to_save": None,
        }
    if isinstance(method, BottleneckConfig):
        return common | {
            "peft_type": "BOTTLENECK",
            "target_modules": list(method.targets),
            "bottleneck_size": method.size,
            "non_linearity": method.activation,
            "scaling": method.scaling,
            "use_parallel_adapter": method.parallel,
        }
    prefix = isinstance(method, PrefixConfig)
    return (
        common
        | {
            "peft_type": "PREFIX_TUNING" if prefix else "PROMPT_TUNING",
            "num_virtual_tokens": num_virtual_tokens(method),
            "num_layers": model.num_layers,
            "num_attention_heads": model.num_kv_heads if prefix else model.num_heads,
            "num_transformer_submodules": 1,
            "token_dim": model.kv_size if prefix else model.hidden_size,
        }
        | ({"prefix_projection": False, "encoder_hidden_size": model.kv_size} if prefix else {})
    )


def read_peft(
    base: ModelWeights,
    files: Mapping[str, bytes],
    max_rank: int,
    choose_layout: Callable[[Method], Layout] = lambda method: ONE_RANK,
) -> AdapterWeights:
    """An adapter from PEFT's two files, of which a rank takes its part. Names, shapes and finiteness are checked
    before anything is used."""
    method = method_from_peft(_settings(files), base.whole)
    if isinstance(method, LoraConfig) and method.rank > max_rank:
        raise InvalidAdapter(f"rank {method.rank} exceeds {max_rank}")
    tensors = _tensors(files)
    values: dict[Key, Tensor] = {}
    for parameter in parameters(base.whole, method):
        value = _checked(tensors, parameter.file_name, parameter.file_shape)
        values[parameter.place] = value.view(parameter.shape)
    for name in _base_copies(method):
        tensors.pop(name, None)
    if tensors:
        raise InvalidAdapter(f"unexpected tensor {sorted(tensors)[0]!r}")
    weights = AdapterWeights(base, method, choose_layout(method))
    weights.load(
        {p.place: weights.shards.part(p, values[p.place]).to(base.device) for p in weights.parameters}
    )
    return weights


def _base_copies(method: Method) -> list[str]:
    """Base weights that PEFT saves beside a LoRA on the embedding or the head; the base model has them."""
    if not isinstance(method, LoraConfig):
        return []
    paths = {EMBEDDING: f"base_model.model.model.{EMBEDDING}", HEAD: f"base_model.model.{HEAD}"}
    return [f"{paths[name]}.base_layer.weight" for name in method.targets if name in paths]


def write_peft(
    model: ModelConfig, method: Method, base_model: str, values: Mapping[Key, Tensor]
) -> dict[str, bytes]:
    """PEFT's two files from each parameter's value."""
    named = {
        p.file_name: values[p.layer, p.key].detach().cpu().reshape(p.file_shape).contiguous()
        for p in parameters(model, method)
    }
    settings = json.dumps(method_to_peft(method, model, base_model), indent=2, sort_keys=True)
    return {
        "adapter_config.json": settings.encode(),
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


def _checked(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
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
