"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), told apart by configuration alone.

One forward pass runs over a flat stream of rows that belong to anyone: tokens being decoded, chunks of
prompts, windows of training sequences. Autograd is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.context import AdapterRun, ForwardContext, LayerContext
from services.gpu_worker.model.peft import EMBEDDING, HEAD
from services.gpu_worker.model.weights import ModelWeights

VIRTUAL_TOKEN = -1  # stands for a learned token: it has a row and a position, but no entry in the vocabulary


class Transformer:
    def __init__(self, weights: ModelWeights, max_position: int) -> None:
        self.weights = weights
        self.config = weights.config
        self.max_position = max_position
        self.cos, self.sin = self._rotations(max_position)

    @property
    def size_bytes(self) -> int:
        """Weights and the rotary embedding's tables."""
        tables = (self.cos, self.sin, self.weights.inverse_frequencies)
        return self.weights.size_bytes + sum(table.nbytes for table in tables)

    def _rotations(self, max_position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position, [max_position, E] in the model's dtype."""
        positions = torch.arange(max_position, device=self.weights.device).float()
        angles = positions[:, None] * self.weights.inverse_frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(self.weights.dtype), angles.sin().to(self.weights.dtype)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: KVCache, batch: ForwardContext) -> Tensor:
        """Hidden states [N, D] after the last layer, before the final norm. `tokens` int64 [N]."""
        x = self.embed(tokens, batch.adapters)
        rotation = self.rotation(batch.positions)
        for index in range(self.config.num_layers):
            x = self.layer(index, x, rotation, cache, batch)
        return x

    def layer(
        self, index: int, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, batch: ForwardContext
    ) -> Tensor:
        """One layer of `forward`: [N, D] of [N, D]; `rotation` of the rows' positions."""
        context = LayerContext(index, rotation, cache, batch, self.weights.group)
        return batch.program(x, self.weights.layers[index], context)

    @torch.no_grad()
    def embed(self, tokens: Tensor, runs: Sequence[AdapterRun]) -> Tensor:
        """What the first layer reads, [N, D]."""
        if any(run.virtual is not None for run in runs):
            tokens = tokens.clamp_min(0)
        x = self.weights.embedding[tokens]
        for run in runs:
            low_rank = run.weights.low_rank(EMBEDDING)
            if low_rank is not None:
                a, b = low_rank
                x[run.start : run.end].addmm_(a[:, tokens[run.start : run.end]].T, b.T)
            if run.virtual is not None and "prompt.rows" in run.weights.outside:
                x[run.virtual.rows] = run.weights.outside["prompt.rows"][run.virtual.tokens]
        return x

    @torch.no_grad()
    def logits(self, hidden: Tensor, runs: Sequence[AdapterRun] = ()) -> Tensor:
        """Float32 logits [N, V] of rows of `forward`'s result (float64 for a float64 model); `runs` says which
        of these rows use which adapter."""
        x = self.final_norm(hidden)
        logits = self.weights.head.forward(x)
        for run in runs:
            low_rank = run.weights.low_rank(HEAD)
            if low_rank is not None:
                a, b = low_rank
                logits[run.start : run.end].addmm_(x[run.start : run.end] @ a.T, b.T)
        return logits.to(accumulation_dtype(hidden.dtype))

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.weights.kernels.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
