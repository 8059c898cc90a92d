"""Forwards over decodes alone, recorded once as CUDA graphs: their hundreds of launches become one.

A recording goes on to the logits and draws a token of each row. Batches are padded up to a few shapes
(`kernels/triton/decode_buffers.py`). Those of the base model are recorded at start-up; any other is launched operation
by operation when it first comes, and recorded when it comes again, if the memory set aside for graphs lasts. Served are
the base model and LoRA adapters on one rank; everything else is launched operation by operation.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.stream_attention import Span
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.lora_stream import StreamRun
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.model.attention import PagedAttention
from services.gpu_worker.model.context import AdapterRun, ForwardContext, RunByRun
from services.gpu_worker.model.low_rank import Together
from services.gpu_worker.model.peft import GROUPS
from services.gpu_worker.model.transformer import Transformer

if TYPE_CHECKING:
    from services.gpu_worker.kernels.triton.decode_buffers import DecodeShape

    Key = tuple[DecodeShape, frozenset[str]]  # and the sites of its adapters

log = logging.getLogger(__name__)
MAX_GRAPHS = 48  # the one that was not needed for longest gives way
MAX_SEEN = 1024  # shapes that have come once
SHARE = 0.05  # of what weights and the key/value cache leave of the memory, for graphs


@dataclass(frozen=True, slots=True)
class Decoded:
    """Of one token of each of n sequences; the next forward overwrites it."""

    hidden: Tensor  # [n, D]
    logits: Tensor  # float32 [n, V], of the base model's head
    tokens: Tensor  # int64 [n], drawn from these logits as they are

    def first(self, num_rows: int) -> Decoded:
        return Decoded(self.hidden[:num_rows], self.logits[:num_rows], self.tokens[:num_rows])


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
        budget: int,
    ) -> None:
        """`budget`: bytes of the device for all recordings and what they read. Raises ValueError for kernels of
        torch: what they gather changes shape from step to step."""
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
        device = weights.device
        self._buffers = DecodeBuffers(shapes, self._max_rows, max_pages, adapters, device)
        self._tokens = torch.zeros(self._max_rows, dtype=torch.int64, device=device)
        # one for all recordings, which would each keep their own
        self._logits = torch.empty(self._max_rows, config.vocab_size, dtype=torch.float32, device=device)
        self._recordings: OrderedDict[Key, Callable[[], Decoded]] = OrderedDict()
        self._seen: set[Key] = set()
        self._recorder = _Recorder(device, budget - self._own_bytes)

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    @property
    def size_bytes(self) -> int:
        return self._own_bytes + self._recorder.taken

    @property
    def _own_bytes(self) -> int:
        return self._buffers.size_bytes + self._tokens.nbytes + self._logits.nbytes

    def record_ahead(self, budget_s: float) -> None:
        """Records forwards of the base model, the largest first, until the time is up. Nothing may be in the cache."""
        from services.gpu_worker.kernels.triton.decode_buffers import ROWS

        started = time.perf_counter()
        for rows in sorted((size for size in ROWS if size <= self._max_rows), reverse=True):
            shape = self._buffers.find_shape([1] * rows, [])
            if shape is None or time.perf_counter() - started > budget_s:
                break
            self._buffers.fill(shape, [1], [[0]], [])
            for _ in range(2):  # for what a first call makes: compiled kernels, libraries' work space
                self._compute(shape, frozenset())
        took_s, mib = time.perf_counter() - started, self.size_bytes >> 20
        log.info("recorded %d forwards over decodes in %.1f s, %d MiB", self.num_recorded, took_s, mib)

    def decode(
        self,
        decodes: Sequence[Span],
        tokens: Tensor,
        adapters: Sequence[AdapterRun],
        sampling: SamplingRows | None = None,
    ) -> Decoded | None:
        """None where no recording serves the batch. `tokens` int64 [n] on the device; `sampling` on the host, None
        where the tokens that are drawn are not wanted."""
        runs = _stream_runs(adapters)
        if runs is None:
            return None
        num_keys = [chunk.start + 1 for chunk, _ in decodes]
        shape = self._buffers.find_shape(num_keys, runs)
        if shape is None:
            return None
        tables = [chunk.sequence.block_table for chunk, _ in decodes]
        self._tokens[: len(tokens)].copy_(tokens)
        self._buffers.fill(shape, num_keys, tables, runs, sampling)
        sites = frozenset().union(*(run.weights.sites for run in adapters))
        return self._compute(shape, sites).first(len(tokens))

    def _compute(self, shape: DecodeShape, sites: frozenset[str]) -> Decoded:
        """What has not come before is launched as it is: a recording's kernels must be there by then."""
        key = shape, sites
        if key not in self._recordings:
            launches = self._launches(shape, sites)
            if key not in self._seen or not self._recorder.has_room:
                self._note(key)
                return launches()
            self._recordings[key] = self._record(key, launches)
        self._recordings.move_to_end(key)
        return self._recordings[key]()

    def _note(self, key: Key) -> None:
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)

    def _record(self, key: Key, launches: Callable[[], Decoded]) -> Callable[[], Decoded]:
        def make_room() -> None:
            while len(self._recordings) >= MAX_GRAPHS:
                self._recordings.popitem(last=False)

        try:
            return self._recorder.record(launches, make_room)
        except RuntimeError as error:
            raise RuntimeError(
                f"no CUDA graph of a forward over {key[0]} could be recorded: {error}; FLEXLLM_CUDA_GRAPHS=false is "
                "the way round"
            ) from error

    def _launches(self, shape: DecodeShape, sites: frozenset[str]) -> Callable[[], Decoded]:
        model, cache, kernels = self._model, self._cache, self._model.weights.kernels
        tables = self._buffers.tables(shape)
        context = ForwardContext(
            positions=tables.positions,
            slots=tables.slots,
            program=self._programs.get(sites, frozenset()),
            attention=PagedAttention(tables.batch, kernels),
        )
        context.low_rank = Together(tables.stream, kernels, RunByRun(()))
        tokens, logits = self._tokens[: shape.rows], self._logits[: shape.rows]

        @torch.no_grad()
        def launch() -> Decoded:
            hidden = model.forward(tokens, cache, context)
            logits.copy_(model.weights.head.forward(model.final_norm(hidden)))
            return Decoded(hidden, logits, kernels.sample_tokens(logits, tables.sampling))

        return launch


class _Recorder:
    """Makes graphs that share their memory: no two of them run at once. Without CUDA launches stay what they are."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device, self._budget = device, budget
        self.taken = 0  # bytes of the device, as its driver counts them
        self._is_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # one: memory is pooled by stream

    @property
    def has_room(self) -> bool:
        return self.taken < self._budget

    def record(self, launches: Callable[[], Decoded], make_room: Callable[[], None]) -> Callable[[], Decoded]:
        """`make_room` drops recordings, whose memory then counts as free. The launches have been made before. Not
        `torch.cuda.graph`, which waits for the device and empties its pool: this happens while serving."""
        free, started = self._free_bytes(), time.perf_counter()
        make_room()
        if self._stream is None:
            return launches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                decoded = launches()
            finally:
                graph.capture_end()
        self.taken = max(0, self.taken + free - self._free_bytes())
        log.debug("recorded a forward over decodes in %.3f s", time.perf_counter() - started)

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._is_cuda else 0


def _stream_runs(adapters: Sequence[AdapterRun]) -> list[StreamRun] | None:
    """None where an adapter does more to a layer than its low-rank parts."""
    runs = []
    for run in adapters:
        pairs = run.weights.low_rank_pairs if run.weights.is_low_rank else None
        if pairs is None:
            return None
        runs.append(StreamRun(run.start, run.end, pairs))
    return runs
