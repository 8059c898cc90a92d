"""The widths that a configuration gives to tensors and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from services.gpu_worker.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one layer. `mean_context` is the number of keys that a token attends to, on average."""

    config: ModelConfig
    mean_context: float

    @classmethod
    def of(cls, config: ModelConfig, sequence_length: int) -> Sizes:
        return cls(config, (sequence_length + 1) / 2)

    @property
    def hidden(self) -> float:
        return float(self.config.hidden_size)

    @property
    def num_heads(self) -> float:
        return float(self.config.num_heads)

    def out_features(self, weight: Any) -> float:
        """Of a node that fetches a weight of the backbone, or a bypass's (`meta["shape"]`)."""
        assert isinstance(weight, Node)
        if "shape" in weight.meta:
            return float(weight.meta["shape"][0])
        config = self.config
        known = {
            "qkv": config.q_size + 2 * config.kv_size,
            "o": config.hidden_size,
            "gate_up": 2 * config.intermediate_size,
            "down": config.hidden_size,
        }
        return float(known[str(weight.args[1])])

    def in_features(self, weight: Any) -> float:
        """Of such a node too."""
        assert isinstance(weight, Node)
        if "shape" in weight.meta:
            return float(weight.meta["shape"][-1])
        config = self.config
        known = {"o": config.q_size, "down": config.intermediate_size}
        return float(known.get(str(weight.args[1]), config.hidden_size))
