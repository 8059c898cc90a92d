"""The paged key/value cache: blocks of `block_size` tokens, one pool for serving and finetuning.

A layer's keys lie as `[num_blocks * G, block_size * E]`, so that a gather by (block, head) gives each
sequence's keys as a dense `[G, S, E]` that a batched matrix product reads without another copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.kernels.norm_rope import rope
from services.gpu_worker.kernels.transfer import to_device


class KVCache:
    """Keys (after the rotary embedding) and values of every layer."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        shape = (num_layers, num_blocks * num_kv_heads, block_size * head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def size_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def slots(self, blocks: list[int], offsets: list[int]) -> Tensor:
        """Where the heads of tokens at (block, offset in block) lie: int64 [N * G]."""
        block = torch.tensor(blocks, dtype=torch.int64)[:, None]
        offset = torch.tensor(offsets, dtype=torch.int64)[:, None]
        head = torch.arange(self.num_kv_heads, dtype=torch.int64)
        slots = (block * self.num_kv_heads + head) * self.block_size + offset
        return to_device(slots.flatten(), self.device)

    def pages(self, block_tables: list[list[int]]) -> Tensor:
        """Gather index of B block tables, the shorter padded with a block of theirs: int64 [B * G * num_pages]."""
        width = max(len(table) for table in block_tables)
        padded = torch.tensor([t + t[:1] * (width - len(t)) for t in block_tables], dtype=torch.int64)
        head = torch.arange(self.num_kv_heads, dtype=torch.int64)[None, :, None]
        return to_device((padded[:, None, :] * self.num_kv_heads + head).flatten(), self.device)

    def clear(self, blocks: list[int]) -> None:
        """Zeroes blocks that will be read before they are full. A mask alone does not hide what an earlier
        owner left there: its weight is zero, but zero times infinity is not."""
        rows = self._rows(blocks)
        self.keys.index_fill_(1, rows, 0)
        self.values.index_fill_(1, rows, 0)

    def _rows(self, blocks: list[int]) -> Tensor:
        """Where the heads of blocks lie: int64 [len(blocks) * G]."""
        rows = torch.tensor(blocks, dtype=torch.int64)[:, None] * self.num_kv_heads
        return to_device((rows + torch.arange(self.num_kv_heads, dtype=torch.int64)).flatten(), self.device)

    def save(self, blocks: list[int]) -> Tensor:
        """A copy of all that blocks hold, in host memory: [2, num_layers, len(blocks) * G, block_size * E]."""
        rows = self._rows(blocks)
        num_layers, _, width = self.keys.shape
        pinned = self.device.type == "cuda"
        saved = torch.empty(2, num_layers, len(rows), width, dtype=self.keys.dtype, pin_memory=pinned)
        for layer in range(num_layers):
            saved[0, layer].copy_(self.keys[layer].index_select(0, rows))
            saved[1, layer].copy_(self.values[layer].index_select(0, rows))
        return saved

    def restore(self, blocks: list[int], saved: Tensor) -> None:
        """The inverse of `save`, into as many blocks."""
        rows = self._rows(blocks)
        for layer in range(self.keys.shape[0]):
            self.keys[layer].index_copy_(0, rows, saved[0, layer].to(self.device))
            self.values[layer].index_copy_(0, rows, saved[1, layer].to(self.device))

    def write(self, layer: int, slots: Tensor, k_NGE: Tensor, v_NGE: Tensor) -> None:
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, slots, k_NGE.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, slots, v_NGE.reshape(-1, self.head_dim))

    def gather(self, layer: int, pages: Tensor, num_tables: int) -> tuple[Tensor, Tensor]:
        """Keys and values behind `pages(...)` of `num_tables` sequences: two dense [B * G, T, E]."""
        shape = (num_tables * self.num_kv_heads, -1, self.head_dim)
        keys = self.keys[layer].index_select(0, pages).view(shape)
        values = self.values[layer].index_select(0, pages).view(shape)
        return keys, values


def rope_cache_write(
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    cos_NE: Tensor,
    sin_NE: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotated queries [N, H, E]; rotated keys, and values, go to `slots` (from `KVCache.slots`), but for those at a
    slot below 0, which go nowhere.

    `keys` and `values` are one layer's, `KVCache.keys[layer]` and `KVCache.values[layer]`.
    """
    head_dim = k_NGE.shape[-1]
    written = slots >= 0
    for cached, heads in ((keys, rope(k_NGE, cos_NE, sin_NE)), (values, v_NGE)):
        cached.view(-1, head_dim).index_copy_(0, slots[written], heads.reshape(-1, head_dim)[written])
    return rope(q_NHE, cos_NE, sin_NE)
