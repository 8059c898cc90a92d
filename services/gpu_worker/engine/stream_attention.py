"""Which keys the rows of a fused forward read: training windows, pieces of prompts and decodes, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.gpu_worker.engine.batch import Chunk
from services.gpu_worker.finetune.job import Window
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.finetune.window_attention import GatheredWindow
from services.gpu_worker.kernels.attention import causal_mask, length_mask
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.attention import (
    Attention,
    GatheredAttention,
    PagedAttention,
    PagedDecode,
    PagedWindow,
    WindowPart,
)

Span = tuple[Chunk, slice]  # a sequence's tokens, and their rows of the stream


@dataclass(frozen=True, slots=True)
class Stream:
    """Who has which rows."""

    windows: Sequence[tuple[Trainer, Window, slice]] = ()
    prompts: Sequence[Span] = ()
    decodes: Sequence[Span] = ()


def attention_of(stream: Stream, cache: KVCache, kernels: Kernels, num_heads: int) -> Attention:
    """For kernels of torch the rest of a block that a row enters is cleared: a mask does not hide an infinity that
    an earlier owner left there."""
    if kernels.is_triton:
        return PagedAttention(_paged(stream, cache), kernels)
    entered = _entered_blocks(stream, cache.block_size)
    if entered:
        cache.clear(entered)
    return _Gathering(cache, num_heads // cache.num_kv_heads).of(stream)


def _paged(stream: Stream, cache: KVCache) -> PagedBatch:
    runs: list[Run] = []
    tables: list[Sequence[int]] = []
    for trainer, window, _ in stream.windows:
        runs += [Run(r.num_tokens, r.num_keys, len(tables), r.first_key) for r in trainer.runs(window)]
        tables.append(trainer.job.blocks)
    for chunk, _ in (*stream.prompts, *stream.decodes):
        runs.append(Run(chunk.num_tokens, chunk.start + chunk.num_tokens, len(tables)))
        tables.append(chunk.sequence.block_table)
    return PagedBatch.make(runs, tables, cache.num_kv_heads, cache.block_size, cache.device)


def _entered_blocks(stream: Stream, block_size: int) -> list[int]:
    """The last block of each chunk that starts in it: its rest is read by decodes before it is written."""
    found = []
    for chunk, _ in (*stream.prompts, *stream.decodes):
        last = (chunk.start + chunk.num_tokens - 1) // block_size
        if last * block_size >= chunk.start:
            found.append(chunk.sequence.block_table[last])
    return found


@dataclass(frozen=True, slots=True)
class _Gathering:
    cache: KVCache
    group: int  # query heads that share a key head

    def of(self, stream: Stream) -> GatheredAttention:
        windows = [self._training(*window) for window in stream.windows]
        windows += [self._prompt(*prompt) for prompt in stream.prompts]
        return GatheredAttention(windows, self._decode(stream.decodes) if stream.decodes else None)

    def _training(self, trainer: Trainer, window: Window, rows: slice) -> PagedWindow:
        found = trainer.attention(window)
        assert isinstance(found, GatheredWindow), "a trainer computes with its model's kernels"
        return found.window.shifted(rows.start)

    def _prompt(self, chunk: Chunk, rows: slice) -> PagedWindow:
        end, cache = chunk.start + chunk.num_tokens, self.cache
        mask = causal_mask(chunk.num_tokens, end, self.group, cache.keys.dtype, cache.device)
        pages = cache.pages([chunk.sequence.block_table[: -(-end // cache.block_size)]])
        return PagedWindow(pages, [WindowPart(rows, slice(0, end), mask)])

    def _decode(self, decodes: Sequence[Span]) -> PagedDecode:
        cache, size = self.cache, self.cache.block_size
        lengths = [chunk.start + 1 for chunk, _ in decodes]
        tables = [
            chunk.sequence.block_table[: -(-n // size)]
            for (chunk, _), n in zip(decodes, lengths, strict=True)
        ]
        mask = length_mask(
            to_device(torch.tensor(lengths), cache.device),
            max(len(table) for table in tables) * size,
            cache.num_kv_heads,
            cache.keys.dtype,
        )
        return PagedDecode(slice(decodes[0][1].start, decodes[-1][1].stop), cache.pages(tables), mask)
