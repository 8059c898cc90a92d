"""What a checkpoint's `config.json` says, reduced to what the decoder computes with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that this engine does not compute."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary frequencies; `kind` is default, linear or llama3 (the other fields are llama3's)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_linear_params(self) -> int:
        """Parameters of the layers' linears, without embedding and head."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        config = json.loads((folder / "config.json").read_text())
        generation = folder / "generation_config.json"
        if generation.exists():
            config["eos_token_id"] = json.loads(generation.read_text()).get(
                "eos_token_id", config.get("eos_token_id")
            )
        return cls.from_hf(config)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads a `config.json`; raises UnsupportedModel with the field that is out of reach."""
        architecture = (config.get("architectures") or ["?"])[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModel(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r}: only silu")
        if config.get("mlp_bias"):
            raise UnsupportedModel("mlp_bias: a bias in the feed-forward layers is not supported")
        if config.get("attention_bias") and architecture != "Qwen2ForCausalLM":
            raise UnsupportedModel("attention_bias: only Qwen2's q, k, v biases are supported")
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            rms_norm_eps=config["rms_norm_eps"],
            max_position=_max_position(config),
            rope=_rope(config),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
        )


def _max_position(config: dict[str, Any]) -> int:
    """Sliding windows are exact up to the window's length, so that is how far we go."""
    limit = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        limit = min(limit, int(window))
    return limit


def _rope(config: dict[str, Any]) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (before)."""
    values = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"rope_type {kind!r} is not one of default, linear, llama3")
    return RopeConfig(
        theta=float(values.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_position=int(values.get("original_max_position_embeddings", 8192)),
    )
