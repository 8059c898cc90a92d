"""The paged key/value cache: blocks of `block_size` tokens, one pool for serving and finetuning.

A layer's keys lie as `[num_blocks * G, block_size * E]`, so that a gather by (block, head) gives each
sequence's keys as a dense `[G, S, E]` that a batched matrix product reads without another copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        return 2 * self.keys.numel() * self.keys.element_size()

    def slots(self, blocks: list[int], offsets: list[int]) -> Tensor:
        """Where the heads of tokens at (block, offset in block) lie: int64 [N * G]."""
        block = torch.tensor(blocks, dtype=torch.int64)[:, None]
        offset = torch.tensor(offsets, dtype=torch.int64)[:, None]
        head = torch.arange(self.num_kv_heads, dtype=torch.int64)
        slots = (block * self.num_kv_heads + head) * self.block_size + offset
        return slots.flatten().to(self.device)

    def pages(self, block_tables: list[list[int]]) -> Tensor:
        """Gather index of B block tables, the shorter padded with a block of theirs: int64 [B * G * num_pages]."""
        width = max(len(table) for table in block_tables)
        padded = torch.tensor([t + t[:1] * (width - len(t)) for t in block_tables], dtype=torch.int64)
        head = torch.arange(self.num_kv_heads, dtype=torch.int64)[None, :, None]
        return (padded[:, None, :] * self.num_kv_heads + head).flatten().to(self.device)

    def clear(self, blocks: list[int]) -> None:
        """Zeroes blocks that will be read before they are full. A mask alone does not hide what an earlier
        owner left there: its weight is zero, but zero times infinity is not."""
        rows = torch.tensor(blocks, dtype=torch.int64)[:, None] * self.num_kv_heads
        rows = (rows + torch.arange(self.num_kv_heads, dtype=torch.int64)).flatten().to(self.device)
        self.keys.index_fill_(1, rows, 0)
        self.values.index_fill_(1, rows, 0)

    def write(self, layer: int, slots: Tensor, k_NGE: Tensor, v_NGE: Tensor) -> None:
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, slots, k_NGE.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, slots, v_NGE.reshape(-1, self.head_dim))

    def gather(self, layer: int, pages: Tensor, num_tables: int) -> tuple[Tensor, Tensor]:
        """Keys and values behind `pages(...)` of `num_tables` sequences: two dense [B * G, T, E]."""
        shape = (num_tables * self.num_kv_heads, -1, self.head_dim)
        keys = self.keys[layer].index_select(0, pages).view(shape)
        values = self.values[layer].index_select(0, pages).view(shape)
        return keys, values
