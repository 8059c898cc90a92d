"""Attention over the paged cache for all rows of a batch at once, and which keys each row reads.

Decodes, pieces of prompts and training windows differ in the number of their tokens only. This is the plain
form, on any device; `kernels/triton/attention.py` has the same function for GPUs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from services.gpu_worker.kernels.attention import causal_mask, window_attention
from services.gpu_worker.kernels.norm_rope import accumulation_dtype

Plan = TypeVar("Plan")
RUN_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows that are the last tokens of one causal context, its keys [first_key, num_keys).

    A decode is a run of one token, a piece of a prompt a run, and so is each example of a packed training
    window: the examples share a block table, and keys count from the table's first token.
    """

    num_tokens: int
    num_keys: int
    table: int = 0  # index of its block table
    first_key: int = 0

    @property
    def num_before(self) -> int:
        """Keys of the table before the first of the run's own tokens."""
        return self.num_keys - self.num_tokens


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Runs that follow each other from row 0 on, and the blocks that hold their keys."""

    runs: tuple[Run, ...]
    num_kv_heads: int
    block_size: int
    columns: Tensor  # int32 [num_runs, 5]: first row, num_tokens, first_key, num_keys, first of its blocks
    blocks: Tensor  # int32: the block tables end to end
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def make(
        cls,
        runs: Sequence[Run],
        block_tables: Sequence[Sequence[int]],
        num_kv_heads: int,
        block_size: int,
        device: torch.device,
    ) -> PagedBatch:
        """Raises ValueError for a run without tokens, or whose keys its table or `first_key` does not hold."""
        for index, run in enumerate(runs):
            held = len(block_tables[run.table]) * block_size
            if run.num_tokens < 1 or not 0 <= run.first_key <= run.num_before or run.num_keys > held:
                raise ValueError(f"run {index}: {run} does not fit into its block table of {held} tokens")
        starts = [0]
        for table in block_tables:
            starts.append(starts[-1] + len(table))
        packed: list[int] = []
        row = 0
        for run in runs:
            packed += (row, run.num_tokens, run.first_key, run.num_keys, starts[run.table])
            row += run.num_tokens
        flat = packed + [block for table in block_tables for block in table]
        tensor = _on_device(flat, device)  # one transfer
        columns = tensor[: len(packed)].view(-1, RUN_COLUMNS)
        return cls(tuple(runs), num_kv_heads, block_size, columns, tensor[len(packed) :])

    @property
    def num_rows(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def on_device(self, numbers: list[int]) -> Tensor:
        """int32, beside the blocks."""
        return _on_device(numbers, self.device)

    def plan(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What a kernel works out once for all layers."""
        if key not in self._plans:
            self._plans[key] = make()
        found: Plan = self._plans[key]
        return found


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """int32; the host does not wait for the transfer."""
    host = int32_of(numbers)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def int32_of(numbers: Iterable[int]) -> Tensor:
    """On the host, several times as fast as torch.tensor makes thousands of them."""
    packed = array("i", numbers)
    return torch.frombuffer(packed, dtype=torch.int32) if packed else torch.empty(0, dtype=torch.int32)


def paged_attention(q_NHE: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Each row against the keys of its run up to its own.

    `keys` and `values` are one layer's, `KVCache.keys[layer]` and `KVCache.values[layer]`, which hold the rows'
    own already. Returns the output [N, H * E] and the natural log-sum-exp of the scaled scores [N, H].
    """
    n, h, e = q_NHE.shape
    out = q_NHE.new_empty(n, h * e)
    lse = q_NHE.new_empty(n, h, dtype=accumulation_dtype(q_NHE.dtype))
    for run, rows, pages in run_pages(batch):
        mask = run_mask(run, h // batch.num_kv_heads, q_NHE)
        own = gather(keys, pages, run, batch), gather(values, pages, run, batch)
        out[rows], lse[rows] = window_attention(q_NHE[rows], *own, mask)
    return out, lse


def run_pages(batch: PagedBatch) -> list[tuple[Run, slice, Tensor]]:
    """Of each run its rows, and where its keys lie in a layer's cache: int64 [G * num_pages]."""
    heads = torch.arange(batch.num_kv_heads, device=batch.device)[:, None]
    found = []
    row = 0
    for run, start in zip(batch.runs, batch.columns[:, -1].tolist(), strict=True):
        num_pages = -(-run.num_keys // batch.block_size)
        blocks = batch.blocks[start : start + num_pages].long()
        pages = (blocks * batch.num_kv_heads + heads).flatten()
        found.append((run, slice(row, row + run.num_tokens), pages))
        row += run.num_tokens
    return found


def run_mask(run: Run, group: int, q: Tensor) -> Tensor:
    return causal_mask(run.num_tokens, run.num_keys - run.first_key, group, q.dtype, q.device)


def gather(cached: Tensor, pages: Tensor, run: Run, batch: PagedBatch) -> Tensor:
    """The run's keys or values, dense [G, num_keys - first_key, E]."""
    e = cached.shape[-1] // batch.block_size
    dense = cached.index_select(0, pages).view(batch.num_kv_heads, -1, e)
    return dense[:, run.first_key : run.num_keys]
