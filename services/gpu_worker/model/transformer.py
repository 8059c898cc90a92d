"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), told apart by configuration alone.

One forward pass runs over a flat stream of rows that belong to anyone: tokens being decoded, chunks of
prompts, windows of training sequences. Autograd is off; a row whose activations are wanted later hands them
to its sink as the layer passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.kernels.attention import decode_attention, window_attention
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.linear import frozen_linear, pack
from services.gpu_worker.kernels.lora import lora_add_
from services.gpu_worker.kernels.norm_rope import accumulation_dtype, rms_norm, rope, silu_mul
from services.gpu_worker.model.adapters import GROUPS
from services.gpu_worker.model.context import ForwardContext, LayerActivations
from services.gpu_worker.model.weights import LayerWeights, ModelWeights


class Transformer:
    def __init__(self, weights: ModelWeights, max_position: int) -> None:
        self.weights = weights
        self.config = weights.config
        self.max_position = max_position
        self.cos, self.sin = self._rotations(max_position)
        self._packed = [{group: pack(getattr(layer, group)) for group in GROUPS} for layer in weights.layers]
        self._packed_head = pack(weights.head)

    def _rotations(self, max_position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position, [max_position, E] in the model's dtype."""
        positions = torch.arange(max_position, device=self.weights.device).float()
        angles = positions[:, None] * self.weights.inverse_frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(self.weights.dtype), angles.sin().to(self.weights.dtype)

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: KVCache, context: ForwardContext) -> Tensor:
        """Hidden states [N, D] after the last layer, before the final norm. `tokens` int64 [N]."""
        x = self.weights.embedding[tokens]
        rotation = self.cos[context.positions], self.sin[context.positions]
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(index, layer, x, rotation, cache, context)
        return x

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N, V] of rows of `forward`'s result (float64 for a float64 model)."""
        logits = frozen_linear(self.final_norm(hidden), self.weights.head, self._packed_head)
        return logits.to(accumulation_dtype(hidden.dtype))

    def final_norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)

    def rotate(self, projected: Tensor, norm: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """A projection [N, heads * E], normed head by head where the model does, and rotated: [N, heads, E]."""
        heads = projected.unflatten(-1, (-1, self.config.head_dim))
        if norm is not None:
            heads = rms_norm(heads, norm, self.config.rms_norm_eps)
        return rope(heads, *rotation)

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        context: ForwardContext,
    ) -> Tensor:
        config, packed = self.config, self._packed[index]
        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        qkv = frozen_linear(h, layer.qkv, packed["qkv"], layer.qkv_bias)
        _bypass_(qkv, h, context, index, "qkv")
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), -1)
        q_NHE = self.rotate(q, layer.q_norm, rotation)
        cache.write(index, context.slots, self.rotate(k, layer.k_norm, rotation), v)

        o, lse = _attention(index, q_NHE, cache, context)
        x2 = _bypass_(frozen_linear(o, layer.o, packed["o"]), o, context, index, "o").add_(x)
        h2 = rms_norm(x2, layer.post_norm, config.rms_norm_eps)
        gate_up = frozen_linear(h2, layer.gate_up, packed["gate_up"])
        _bypass_(gate_up, h2, context, index, "gate_up")
        m = silu_mul(gate_up)
        y = _bypass_(frozen_linear(m, layer.down, packed["down"]), m, context, index, "down").add_(x2)

        if context.captures:
            activations = LayerActivations(x, q, k, o, lse, x2, gate_up)
            for capture in context.captures:
                capture.sink.save(index, capture.start, capture.rows, activations)
        return y


def _bypass_(y: Tensor, x: Tensor, context: ForwardContext, layer: int, group: str) -> Tensor:
    """Adds every adapter's part to a fused linear's output `y` of its input `x`, in place."""
    segments = [segment for run in context.adapters if (segment := run.segment(layer, group, x)) is not None]
    return lora_add_(y, x, segments)


def _attention(layer: int, q_NHE: Tensor, cache: KVCache, context: ForwardContext) -> tuple[Tensor, Tensor]:
    """Output [N, H * E] of all rows and, for the rows of windows, the log-sum-exp [H, N]."""
    n, h, e = q_NHE.shape
    out = q_NHE.new_empty(n, h * e)
    lse = q_NHE.new_empty(h, n, dtype=accumulation_dtype(q_NHE.dtype))
    for window in context.windows:
        keys, values = cache.gather(layer, window.pages, 1)
        for part in window.parts:
            out[part.rows], lse[:, part.rows] = window_attention(
                q_NHE[part.rows], keys[:, part.keys], values[:, part.keys], part.mask
            )
    if context.decode is not None:
        rows = context.decode.rows
        keys, values = cache.gather(layer, context.decode.pages, rows.stop - rows.start)
        out[rows] = decode_attention(q_NHE[rows], keys, values, context.decode.mask)
    return out, lse
