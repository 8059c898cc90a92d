"""Caches in scattered blocks, batches over them, and attention from its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run


@dataclass(slots=True)
class PagedCase:
    q: Tensor  # [N, H, E]
    cache: KVCache  # of one layer
    batch: PagedBatch
    tables: list[list[int]]

    @property
    def keys(self) -> Tensor:
        return self.cache.keys[0]

    @property
    def values(self) -> Tensor:
        return self.cache.values[0]

    def dense(self, run: Run) -> tuple[Tensor, Tensor]:
        """The run's keys and values in float64, [G, num_keys - first_key, E] each."""
        pages = self.cache.pages([self.tables[run.table]])
        keys, values = self.cache.gather(0, pages, 1)
        own = slice(run.first_key, run.num_keys)
        return keys[:, own].double(), values[:, own].double()

    def runs(self) -> list[tuple[Run, slice]]:
        starts = torch.tensor([0, *(run.num_tokens for run in self.batch.runs)]).cumsum(0).tolist()
        return [(run, slice(a, a + run.num_tokens)) for run, a in zip(self.batch.runs, starts, strict=False)]


def make_case(
    runs: Sequence[Run],
    *,
    group: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
) -> PagedCase:
    """Blocks in random order. What no run may read is infinite, and so are the blocks of nobody."""
    random = torch.Generator().manual_seed(seed)
    num_tables = 1 + max(run.table for run in runs)
    lengths = [max(run.num_keys for run in runs if run.table == i) for i in range(num_tables)]
    widths = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(widths) + 3, generator=random).tolist()
    tables = [order[sum(widths[:i]) : sum(widths[: i + 1])] for i in range(num_tables)]
    device = device or torch.device("cpu")
    cache = KVCache(1, len(order), block_size, num_kv_heads, head_dim, dtype, device)
    cache.keys.fill_(float("inf"))
    cache.values.fill_(float("inf"))
    for table, length in zip(tables, lengths, strict=True):
        places = range(length)
        slots = cache.slots([table[i // block_size] for i in places], [i % block_size for i in places])
        k, v = (torch.randn(length, num_kv_heads, head_dim, generator=random) for _ in range(2))
        cache.write(0, slots, k.to(device, dtype), v.to(device, dtype))
    num_rows = sum(run.num_tokens for run in runs)
    q = torch.randn(num_rows, num_kv_heads * group, head_dim, generator=random).to(device, dtype)
    return PagedCase(q, cache, PagedBatch.make(runs, tables, num_kv_heads, block_size, device), tables)


def attention(q_NHE: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, H, E] and log-sum-exp [N, H] from the definition; queries are the last rows of the keys."""
    n, h, e = q_NHE.shape
    g, s, _ = keys.shape
    heads = torch.arange(h, device=keys.device) // (h // g)
    scores = torch.einsum("nhe,hse->hns", q_NHE, keys[heads]) / math.sqrt(e)
    positions = torch.arange(s, device=keys.device)
    scores = scores.masked_fill(positions[None] > positions[s - n :, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return torch.einsum("hns,hse->nhe", torch.exp(scores - lse[..., None]), values[heads]), lse.T
