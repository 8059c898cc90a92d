"""The reserved activations of one training sequence: what the backward reads and cannot recompute cheaply."""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import LayerActivations

# What is kept beside the layer input and the keys and values in the cache; the rest is recomputed.
POLICIES: dict[str, frozenset[str]] = {
    "full": frozenset({"q", "o", "x2", "gate_up"}),
    "no_gu": frozenset({"q", "o", "x2"}),
    "no_gu_q": frozenset({"o", "x2"}),
    "x_o": frozenset({"o"}),
    "x_only": frozenset(),
}


class ActivationStore:
    """Buffers of `capacity` tokens for every layer, reused from one training sequence to the next.

    `x` is always kept; `lse` goes with `o`; `k` (before its norm) goes with `q` where the model norms keys.
    """

    def __init__(
        self, config: ModelConfig, policy: str, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"activation policy {policy!r} is not one of {', '.join(POLICIES)}")
        kept = POLICIES[policy]
        self.capacity = capacity
        widths = {
            "x": config.hidden_size,
            "q": config.q_size,
            "o": config.q_size,
            "x2": config.hidden_size,
            "gate_up": 2 * config.intermediate_size,
        }
        if config.qk_norm:
            widths["k"] = config.kv_size
        self._tensors: dict[str, Tensor] = {
            name: torch.empty(config.num_layers, capacity, width, dtype=dtype, device=device)
            for name, width in widths.items()
            if name == "x" or name in kept or (name == "k" and "q" in kept)
        }
        if "o" in kept:
            wide = accumulation_dtype(dtype)
            shape = (config.num_layers, config.num_heads, capacity)
            self._tensors["lse"] = torch.empty(shape, dtype=wide, device=device)

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def clear(self) -> None:
        """Fills every buffer with zeros."""
        for tensor in self._tensors.values():
            tensor.zero_()

    def save(self, layer: int, start: int, rows: slice, activations: LayerActivations) -> None:
        """Keeps rows [rows] of a forward as the tokens from `start` on."""
        tokens = slice(start, start + rows.stop - rows.start)
        for name, buffer in self._tensors.items():
            value: Tensor = getattr(activations, name)
            if name == "lse":
                buffer[layer][:, tokens].copy_(value[:, rows])
            else:
                buffer[layer, tokens].copy_(value[rows])

    def get(self, name: str, layer: int, tokens: slice) -> Tensor | None:
        """Rows [tokens] of a kept tensor ([H, n] for `lse`), or None where it has to be recomputed."""
        buffer = self._tensors.get(name)
        if buffer is None:
            return None
        return buffer[layer][:, tokens] if name == "lse" else buffer[layer, tokens]
