"""One layer backward over a token window, exact for any cut of the sequence into windows.

Order: layers from the last to the first; in a layer, windows from the last to the first. When a window's turn
comes, every later token has added its part to the keys' and values' gradients of the window's own rows, so
they are complete. One pair of accumulators and one gradient of the residual stream serve all layers.
Source: FlexLLM (arXiv 2402.18789), section 4; formulas checked against whole-sequence autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from services.gpu_worker.finetune.activations import ActivationStore
from services.gpu_worker.finetune.optimizer import LoraParameters
from services.gpu_worker.kernels.attention import window_attention
from services.gpu_worker.kernels.attention_backward import window_attention_backward
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.lora import lora_add_, lora_backward
from services.gpu_worker.kernels.norm_rope import (
    rms_norm,
    rms_norm_backward,
    rope_backward,
    silu_mul,
    silu_mul_backward,
)
from services.gpu_worker.model.context import AdapterRun, PagedWindow
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import LayerWeights

Rotation = tuple[Tensor, Tensor]


@dataclass(slots=True)
class GradientState:
    """Gradients in flight of one training sequence of T tokens."""

    dx: Tensor  # [T, D]: of the layer's output, overwritten by that of its input
    dk: Tensor  # [G, T, E] of the rotated keys, summed over the windows done, float32
    dv: Tensor

    def begin_layer(self) -> None:
        self.dk.zero_()
        self.dv.zero_()


@dataclass(slots=True)
class LayerBackward:
    """Everything that one layer's backward reads; `window` says which rows and keys."""

    model: Transformer
    cache: KVCache
    parameters: LoraParameters
    store: ActivationStore
    index: int
    bypasses: AdapterRun  # of the window's rows

    @property
    def layer(self) -> LayerWeights:
        return self.model.weights.layers[self.index]

    @torch.no_grad()
    def run(self, start: int, positions: Tensor, window: PagedWindow, state: GradientState) -> None:
        """Replaces `state.dx` of the window's rows; adds to the gradients of the layer's bypasses.

        `positions` [n] are the tokens' positions in their examples, the window's rows count from `start`.
        """
        config, layer = self.model.config, self.layer
        tokens = slice(start, start + len(positions))
        rotation = self.model.cos[positions], self.model.sin[positions]
        keys, values = self.cache.gather(self.index, window.pages, 1)

        x = self.store.get("x", self.index, tokens)
        assert x is not None
        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q, k = self._projections(h, tokens)
        q_NHE = self.model.rotate(q, layer.q_norm, rotation)
        o, lse = self._attention(tokens, q_NHE, keys, values, window)
        x2 = self.store.get("x2", self.index, tokens)
        if x2 is None:
            x2 = self._linear("o", o, layer.o).add_(x)

        dx2 = self._feed_forward(state.dx[tokens], x2, tokens)
        d_o = self._linear_backward("o", dx2, o, layer.o)
        assert d_o is not None
        dq_NHE = torch.empty_like(q_NHE)
        for part in window.parts:
            dq_NHE[part.rows], dk, dv = window_attention_backward(
                d_o[part.rows],
                q_NHE[part.rows],
                keys[:, part.keys],
                values[:, part.keys],
                o[part.rows],
                lse[:, part.rows],
                part.mask,
            )
            state.dk[:, part.keys] += dk
            state.dv[:, part.keys] += dv

        dk_NGE = state.dk[:, tokens].transpose(0, 1).to(x.dtype)
        dv_NGE = state.dv[:, tokens].transpose(0, 1).to(x.dtype)
        d_qkv = torch.cat(
            (
                self._unrotate(dq_NHE, q, layer.q_norm, rotation),
                self._unrotate(dk_NGE, k, layer.k_norm, rotation),
                dv_NGE.flatten(1),
            ),
            -1,
        )
        first = self.index == 0  # the embedding is frozen: nothing below wants a gradient
        dh = self._linear_backward("qkv", d_qkv, h, layer.qkv, need_input=not first)
        if dh is not None:
            state.dx[tokens] = dx2 + rms_norm_backward(dh, x, layer.input_norm, config.rms_norm_eps)

    def _projections(self, h: Tensor, tokens: slice) -> tuple[Tensor, Tensor | None]:
        """q before norm and rotation, and k where a norm's backward reads it; kept or recomputed."""
        config, layer = self.model.config, self.layer
        q, k = self.store.get("q", self.index, tokens), self.store.get("k", self.index, tokens)
        if q is not None and (k is not None or not config.qk_norm):
            return q, k
        width = config.q_size + (config.kv_size if config.qk_norm else 0)
        bias = None if layer.qkv_bias is None else layer.qkv_bias[:width]
        out = linear(h, layer.qkv[:width], bias)
        bypass = self.bypasses.segment(self.index, "qkv", h)
        if bypass is not None:
            lora_add_(out, h, [replace(bypass, b=bypass.b[:width])])
        return out[:, : config.q_size], out[:, config.q_size :] if config.qk_norm else None

    def _attention(
        self, tokens: slice, q_NHE: Tensor, keys: Tensor, values: Tensor, window: PagedWindow
    ) -> tuple[Tensor, Tensor]:
        o, lse = self.store.get("o", self.index, tokens), self.store.get("lse", self.index, tokens)
        if o is not None and lse is not None:
            return o, lse
        parts = [
            window_attention(q_NHE[p.rows], keys[:, p.keys], values[:, p.keys], p.mask) for p in window.parts
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], -1)

    def _feed_forward(self, dy: Tensor, x2: Tensor, tokens: slice) -> Tensor:
        """Gradient of the residual stream between attention and feed-forward."""
        config, layer = self.model.config, self.layer
        h2 = rms_norm(x2, layer.post_norm, config.rms_norm_eps)
        gate_up = self.store.get("gate_up", self.index, tokens)
        if gate_up is None:
            gate_up = self._linear("gate_up", h2, layer.gate_up)
        dm = self._linear_backward("down", dy, silu_mul(gate_up), layer.down)
        assert dm is not None
        dh2 = self._linear_backward("gate_up", silu_mul_backward(dm, gate_up), h2, layer.gate_up)
        assert dh2 is not None
        return dy + rms_norm_backward(dh2, x2, layer.post_norm, config.rms_norm_eps)

    def _unrotate(
        self, d_rotated: Tensor, projected: Tensor | None, norm: Tensor | None, rotation: Rotation
    ) -> Tensor:
        """Through the rotation and, where the model has one, the norm of the heads: [n, heads * E]."""
        d_heads = rope_backward(d_rotated, *rotation)
        if norm is not None and projected is not None:
            heads = projected.unflatten(-1, (-1, self.model.config.head_dim))
            d_heads = rms_norm_backward(d_heads, heads, norm, self.model.config.rms_norm_eps)
        return d_heads.flatten(1)

    def _linear(self, group: str, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.T
        bypass = self.bypasses.segment(self.index, group, x)
        return y if bypass is None else lora_add_(y, x, [bypass])

    def _linear_backward(
        self, group: str, dy: Tensor, x: Tensor, weight: Tensor, need_input: bool = True
    ) -> Tensor | None:
        dx = dy @ weight if need_input else None
        bypass = self.bypasses.segment(self.index, group, x)
        if bypass is not None:
            gradient = self.parameters.gradients[self.index][group]
            lora_backward(dy, x, bypass, dx, gradient.a, gradient.b)
        return dx
