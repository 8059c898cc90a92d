"""Models with random weights made on the device, and transformers' own model over the same memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.gpu.scales import TARGETS
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import Key
from services.gpu_worker.model.peft import projections
from services.gpu_worker.model.weights import ModelWeights, build_weights

STD = 0.02
RANK = 16


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> ModelWeights:
    """As an untrained model has them: normal, norms of one, biases of zero."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = dict.fromkeys(("model.embed_tokens", "lm_head"), (config.vocab_size, config.hidden_size))
    wide |= {p.path: (p.out_features, p.in_features) for p in projections(config).values()}

    def fetch(name: str) -> Tensor:
        path, _, kind = name.rpartition(".")
        own = path.removeprefix("model.layers.").partition(".")[2] if ".layers." in path else path
        if own not in wide:
            size = config.head_dim if own.endswith(("q_norm", "k_norm")) else config.hidden_size
            return torch.ones(size, dtype=dtype, device=device)
        if kind == "bias":
            return torch.zeros(wide[own][0], dtype=dtype, device=device)
        return torch.randn(wide[own], generator=generator, dtype=dtype, device=device).mul_(STD)

    return build_weights(config, fetch)


def transformers_model(hf_config: dict[str, Any], weights: ModelWeights) -> Any:
    """transformers' model, frozen, whose parameters are views of `weights`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in hf_config.items() if k != "model_type"}
    config = AutoConfig.for_model(hf_config["model_type"], **settings)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config, dtype=weights.dtype, attn_implementation="sdpa")
    model.load_state_dict(dict(_state(weights)), assign=True)
    with weights.device:  # its buffers are in no checkpoint
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


def _state(weights: ModelWeights) -> Iterator[tuple[str, Tensor]]:
    """By the names of a checkpoint."""
    config = weights.config
    sizes = (config.q_size, config.kv_size, config.kv_size)
    yield "model.embed_tokens.weight", weights.embedding
    yield "model.norm.weight", weights.norm
    yield "lm_head.weight", weights.head.dense()
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        for name, part in zip("qkv", layer.qkv.dense().split(sizes), strict=True):
            yield f"{prefix}self_attn.{name}_proj.weight", part
        if layer.qkv.bias is not None:
            for name, part in zip("qkv", layer.qkv.bias.split(sizes), strict=True):
                yield f"{prefix}self_attn.{name}_proj.bias", part
        yield f"{prefix}self_attn.o_proj.weight", layer.o.dense()
        gate, up = layer.gate_up.dense().chunk(2)
        yield f"{prefix}mlp.gate_proj.weight", gate
        yield f"{prefix}mlp.up_proj.weight", up
        yield f"{prefix}mlp.down_proj.weight", layer.down.dense()
        yield f"{prefix}input_layernorm.weight", layer.input_norm
        yield f"{prefix}post_attention_layernorm.weight", layer.post_norm


class LoraLinear(nn.Module):
    """As peft has it by default: adapters are float32, and so is the copy of the input that they read."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        options: dict[str, Any] = {"dtype": torch.float32, "device": base.weight.device}
        self.a = nn.Parameter(torch.empty(RANK, base.in_features, **options))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK, **options))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y + (linear(linear(x.to(self.a.dtype), self.a), self.b) * 2).to(y.dtype)


def add_lora(model: Any) -> tuple[Any, str]:
    """The model with LoRA of rank 16, alpha 32, on every linear, ready to train; and whose LoRA it is: peft's where
    peft is installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    setattr(parent, name, LoraLinear(child))
        return model.train(), "transformers + autograd"
    method = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    return get_peft_model(model, method).train(), "transformers + peft"


def copy_adapters(model: Any, start: dict[Key, Tensor]) -> None:
    """Lets `add_lora`'s adapters begin as ours, by (layer, "q_proj.a")."""
    with torch.no_grad():
        for name, module in model.named_modules():
            parts = name.split(".")
            if parts[-1] not in TARGETS:
                continue
            own = (module.a, module.b) if isinstance(module, LoraLinear) else _of_peft(module)
            layer = int(parts[parts.index("layers") + 1])
            for role, parameter in zip("ab", own, strict=True):
                parameter.copy_(start[layer, f"{parts[-1]}.{role}"])


def _of_peft(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight
