"""Attention over a stream of rows that belong to anyone, in the form that an engine's kernels take.

On a CPU keys are gathered into dense tensors, one for each sequence, and masks hide what a row does not see: torch's
blocked product takes these. Triton's kernels read the pages where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from services.gpu_worker.kernels.attention import decode_attention, window_attention
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.paged_attention import PagedBatch


class Attention(Protocol):
    """Knows which keys each row of a stream reads, in every layer."""

    def attend(self, q_NHE: Tensor, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """The output [N, H * E] and the log-sum-exp [N, H], which only rows that train need."""


@dataclass(slots=True)
class WindowPart:
    """A run of rows of one causal sequence: they are the last rows of `keys` in the gathered pages."""

    rows: slice
    keys: slice
    mask: Tensor  # from kernels.attention.causal_mask


@dataclass(slots=True)
class PagedWindow:
    """Rows that read the same block table: one prefill chunk, or a window over packed examples."""

    pages: Tensor
    parts: list[WindowPart]

    def shifted(self, offset: int) -> PagedWindow:
        """The same keys for rows that start at `offset` of the stream."""
        parts = [
            WindowPart(slice(p.rows.start + offset, p.rows.stop + offset), p.keys, p.mask) for p in self.parts
        ]
        return PagedWindow(self.pages, parts)


@dataclass(slots=True)
class PagedDecode:
    """Rows with one query token a sequence, attended together."""

    rows: slice
    pages: Tensor
    mask: Tensor  # from kernels.attention.length_mask


@dataclass(slots=True)
class GatheredAttention:
    """With masks over gathered pages."""

    windows: list[PagedWindow] = field(default_factory=list)
    decode: PagedDecode | None = None

    def attend(self, q_NHE: Tensor, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        n, h, e = q_NHE.shape
        out = q_NHE.new_empty(n, h * e)
        lse = q_NHE.new_empty(n, h, dtype=accumulation_dtype(q_NHE.dtype))
        for window in self.windows:
            keys, values = cache.gather(layer, window.pages, 1)
            for part in window.parts:
                out[part.rows], lse[part.rows] = window_attention(
                    q_NHE[part.rows], keys[:, part.keys], values[:, part.keys], part.mask
                )
        if self.decode is not None:
            rows = self.decode.rows
            keys, values = cache.gather(layer, self.decode.pages, rows.stop - rows.start)
            out[rows] = decode_attention(q_NHE[rows], keys, values, self.decode.mask)
        return out, lse


@dataclass(slots=True)
class PagedAttention:
    """All rows in one launch, over pages where they lie."""

    batch: PagedBatch
    kernels: Kernels

    def attend(self, q_NHE: Tensor, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        return self.kernels.paged_attention(q_NHE, cache.keys[layer], cache.values[layer], self.batch)
