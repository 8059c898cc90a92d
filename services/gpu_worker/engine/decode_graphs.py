"""Forwards over decodes alone, recorded once as CUDA graphs: their hundreds of launches become one.

Batches are padded up to a few shapes (`kernels/triton/decode_buffers.py`), each recorded when it first comes. Served
are the base model and LoRA adapters of one rank; everything else is launched operation by operation.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.stream_attention import Span
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.lora_stream import StreamRun
from services.gpu_worker.model.attention import PagedAttention
from services.gpu_worker.model.context import AdapterRun, ForwardContext, RunByRun
from services.gpu_worker.model.low_rank import Together
from services.gpu_worker.model.peft import GROUPS
from services.gpu_worker.model.transformer import Transformer

if TYPE_CHECKING:
    from services.gpu_worker.kernels.triton.decode_buffers import DecodeShape

log = logging.getLogger(__name__)
MAX_GRAPHS = 48  # the one that was not needed for longest gives way


class DecodeGraphs:
    """On a machine without CUDA the padded forwards run as they are, which is how their tests see them."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        programs: ForwardPrograms,
        max_rows: int,
        max_model_len: int,
        max_adapters: int,
    ) -> None:
        """Raises ValueError for kernels of torch: what they gather changes shape from step to step."""
        if not model.weights.kernels.is_triton:
            raise ValueError("forwards over decodes can be recorded with kernels of Triton only")
        from services.gpu_worker.kernels.triton.attention_tiles import Shapes
        from services.gpu_worker.kernels.triton.decode_buffers import ROWS, DecodeBuffers

        config, weights = model.config, model.weights
        self._model, self._cache, self._programs = model, cache, programs
        group = config.num_heads // config.num_kv_heads
        shapes = Shapes(weights.dtype, config.num_kv_heads, group, cache.block_size, config.head_dim)
        self._max_rows = next((size for size in ROWS if size >= max_rows), ROWS[-1])
        max_pages = -(-max_model_len // cache.block_size)
        adapters = config.num_layers, len(GROUPS), max_adapters
        self._buffers = DecodeBuffers(shapes, self._max_rows, max_pages, adapters, weights.device)
        self._tokens = torch.zeros(self._max_rows, dtype=torch.int64, device=weights.device)
        self._recordings: OrderedDict[tuple[DecodeShape, frozenset[str]], Callable[[], Tensor]] = (
            OrderedDict()
        )
        self._pool = torch.cuda.graph_pool_handle() if weights.device.type == "cuda" else None

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def record_ahead(self, budget_s: float) -> None:
        """Records forwards of the base model, the largest first, until the time is up. Nothing may be in the cache."""
        from services.gpu_worker.kernels.triton.decode_buffers import ROWS

        until_s = time.perf_counter() + budget_s
        for rows in sorted((size for size in ROWS if size <= self._max_rows), reverse=True):
            shape = self._buffers.find_shape([1] * rows, [])
            if shape is None or time.perf_counter() > until_s:
                return
            self._buffers.fill(shape, [1], [[0]], [])
            self._recorded(shape, frozenset())

    def forward(
        self, decodes: Sequence[Span], tokens: Tensor, adapters: Sequence[AdapterRun]
    ) -> Tensor | None:
        """Hidden states [n, D] of one token of each sequence, valid until the next call; None where no graph serves
        them. `tokens` int64 [n] on the device."""
        runs = _stream_runs(adapters)
        if runs is None:
            return None
        num_keys = [chunk.start + 1 for chunk, _ in decodes]
        shape = self._buffers.find_shape(num_keys, runs)
        if shape is None:
            return None
        tables = [chunk.sequence.block_table for chunk, _ in decodes]
        self._tokens[: len(tokens)].copy_(tokens)
        self._buffers.fill(shape, num_keys, tables, runs)
        sites = frozenset().union(*(run.weights.sites for run in adapters))
        return self._recorded(shape, sites)()[: len(tokens)]

    def _recorded(self, shape: DecodeShape, sites: frozenset[str]) -> Callable[[], Tensor]:
        key = shape, sites
        if key not in self._recordings:
            while len(self._recordings) >= MAX_GRAPHS:
                self._recordings.popitem(last=False)
            self._recordings[key] = self._guarded_record(shape, sites)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _guarded_record(self, shape: DecodeShape, sites: frozenset[str]) -> Callable[[], Tensor]:
        try:
            return self._record(self._launches(shape, sites))
        except RuntimeError as error:
            raise RuntimeError(
                f"no CUDA graph of a forward over {shape} could be recorded: {error}; FLEXLLM_CUDA_GRAPHS=false is the "
                "way round"
            ) from error

    def _launches(self, shape: DecodeShape, sites: frozenset[str]) -> Callable[[], Tensor]:
        model, cache, kernels = self._model, self._cache, self._model.weights.kernels
        tables = self._buffers.tables(shape)
        context = ForwardContext(
            positions=tables.positions,
            slots=tables.slots,
            program=self._programs.get(sites, frozenset()),
            attention=PagedAttention(tables.batch, kernels),
        )
        context.low_rank = Together(tables.stream, kernels, RunByRun(()))
        tokens = self._tokens[: shape.rows]
        return lambda: model.forward(tokens, cache, context)

    def _record(self, launches: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs once before, for what a first call makes: compiled kernels, libraries' work space."""
        if self._pool is None:
            return launches
        started = time.perf_counter()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            launches()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = launches()
        log.info("recorded a forward over decodes in %.2f s", time.perf_counter() - started)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def _stream_runs(adapters: Sequence[AdapterRun]) -> list[StreamRun] | None:
    """None where an adapter does more to a layer than its low-rank parts."""
    runs = []
    for run in adapters:
        pairs = run.weights.low_rank_pairs if run.weights.is_low_rank else None
        if pairs is None:
            return None
        runs.append(StreamRun(run.start, run.end, pairs))
    return runs
