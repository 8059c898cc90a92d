"""One layer backward over a token window, exact for any cut of the sequence into windows.

Order: layers from the last to the first; in a layer, windows from the last to the first. When a window's turn
comes, every later token has added its part to the keys' and values' gradients of the window's own rows, so
they are complete. One pair of accumulators and one gradient of the residual stream serve all layers. What is
computed in between is the program that the compiler has derived.
Source: FlexLLM (arXiv 2402.18789), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.finetune.window_attention import LayerAttention
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import AdapterRun
from services.gpu_worker.model.layouts import Move
from services.gpu_worker.model.parallel import ALONE, Group


@dataclass(slots=True)
class GradientState:
    """Gradients in flight of a training sequence of up to T tokens, `depth` neighbouring layers of which may be
    under way at a time. In a forward layer by layer the residual stream itself is where its gradient will be."""

    dx: Tensor  # [T, D]: of the layer's output, overwritten by that of its input
    dk: Tensor  # [depth, G, T, E] of the rotated keys, summed over the windows done, float32
    dv: Tensor

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        depth: int = 1,
    ) -> GradientState:
        shape = depth, config.num_kv_heads, num_tokens, config.head_dim
        wide = accumulation_dtype(dtype)
        return cls(
            torch.zeros(num_tokens, config.hidden_size, dtype=dtype, device=device),
            torch.zeros(shape, dtype=wide, device=device),
            torch.zeros(shape, dtype=wide, device=device),
        )

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype, depth: int = 1) -> int:
        cached = 2 * config.kv_size * accumulation_dtype(dtype).itemsize
        return config.hidden_size * dtype.itemsize + depth * cached

    @property
    def size_bytes(self) -> int:
        return self.dx.nbytes + self.dk.nbytes + self.dv.nbytes

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's sums [G, T, E] over keys and values."""
        index = layer % len(self.dk)
        return self.dk[index], self.dv[index]

    def begin_layer(self, layer: int) -> None:
        for summed in self.cached(layer):
            summed.zero_()


@dataclass(slots=True)
class BackwardContext:
    """A window of a training sequence as a layer's backward program sees it; its rows count from 0.

    `run` says whose adapter the rows use.
    """

    index: int
    tokens: slice
    rotation: tuple[Tensor, Tensor]
    attention: LayerAttention
    run: AdapterRun
    state: GradientState
    group: Group = ALONE

    def all_reduce_(self, x: Tensor) -> Tensor:
        return self.group.all_reduce_(x)

    def move(self, x: Tensor, step: Move, width: int) -> Tensor:
        return self.group.move(x, step, self.tokens.stop - self.tokens.start, width)

    def attend(self, q: Tensor, cached: None) -> tuple[Tensor, Tensor]:
        return self.attention.attend(self._heads(q))

    def attend_backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, None]:
        sums = self.state.cached(self.index)
        return self.attention.attend_backward(do, self._heads(q), o, lse, *sums).flatten(1), None

    def cache_gradient(self) -> tuple[Tensor, Tensor]:
        dk, dv = self.state.cached(self.index)
        return self._own_rows(dk), self._own_rows(dv)

    def _own_rows(self, summed: Tensor) -> Tensor:
        return summed[:, self.tokens].transpose(0, 1).to(self.state.dx.dtype).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.state.dk.shape[-1])

    def without_virtual(self, gradient: Tensor) -> Tensor:
        virtual = self.run.virtual
        return gradient if virtual is None else gradient.index_fill(0, virtual.rows, 0)

    def accumulate_virtual(self, grad: Tensor, gradient: Tensor) -> None:
        """`grad` [num_virtual_tokens, width] += the rows of virtual tokens."""
        virtual = self.run.virtual
        if virtual is not None:
            grad.index_add_(0, virtual.tokens, gradient[virtual.rows].to(grad.dtype))

    def dropout(self, x: Tensor, group: str) -> Tensor:
        mask = self.run.mask(self.index, group, x)
        assert mask is not None
        return x * mask
