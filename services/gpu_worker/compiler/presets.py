"""Shapes of well-known models, so that a plan can be made for a model that is not on this machine.

Each is what the published `config.json` says, less the fields that change neither bytes nor operations.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from services.gpu_worker.model.config import UnsupportedModel

_LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _LLAMA31 | _shape(32, 4096, 14336, 32, 8),
    "Llama-3.1-70B": _LLAMA31 | _shape(80, 8192, 28672, 64, 8),
    "Qwen2.5-14B": _QWEN25 | _shape(48, 5120, 13824, 40, 8),
    "Qwen2.5-32B": _QWEN25 | _shape(64, 5120, 27648, 40, 8),
    "SmolLM2-135M": _SMOLLM2 | _shape(30, 576, 1536, 9, 3),
}


def preset(name: str) -> dict[str, Any]:
    """The model's `config.json`, the caller's own copy; upper and lower case are the same.

    Raises UnsupportedModel with the known names.
    """
    for known, config in PRESETS.items():
        if known.lower() == name.lower():
            return deepcopy(config)
    raise UnsupportedModel(f"no shapes are known for {name!r}, only for {', '.join(PRESETS)}")
