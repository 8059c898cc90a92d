"""What a fused forward reads beside the weights: the tokens of its rows, and where and with whose adapters they are
computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.batch import JobWindow
from services.gpu_worker.engine.rows import Rows
from services.gpu_worker.engine.sampler import Drawn
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.stream_attention import Stream, attention_of
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.attention import Attention
from services.gpu_worker.model.context import AdapterRun, Capture, ForwardContext, VirtualRows, runs_of
from services.gpu_worker.model.low_rank import low_rank_of
from services.gpu_worker.model.transformer import Transformer


class StreamInputs:
    """Of batches' rows, for one model. `trainers` and `adapters` may change between batches."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        adapters: AdapterPool,
        programs: ForwardPrograms,
        trainers: Mapping[str, Trainer],
    ) -> None:
        self._model = model
        self._cache = cache
        self._adapters = adapters
        self._programs = programs
        self._trainers = trainers
        self._device = model.weights.device

    def tokens(self, rows: Rows, drawn: Drawn | None) -> Tensor:
        """int64 [N]; `drawn` by the batch before."""
        tokens = [self._trainer(work).tokens(work.window) for work, _ in rows.forwards]
        flat: list[int] = []
        for chunk, _ in rows.chunks:
            flat += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
        tokens.append(to_device(torch.tensor(flat, dtype=torch.int64), self._device))
        stream = torch.cat(tokens)
        _fill_in_pending(stream, rows, drawn)
        return stream

    def context(self, rows: Rows) -> ForwardContext:
        positions: list[Tensor] = []
        blocks: list[int] = []
        offsets: list[int] = []
        captures: list[Capture] = []
        size = self._cache.block_size
        for work, span in rows.forwards:
            trainer, window = self._trainer(work), work.window
            positions.append(trainer.positions(window))
            blocks += [work.job.blocks[i // size] for i in range(window.start, window.end)]
            offsets += [i % size for i in range(window.start, window.end)]
            if not work.sequence.evaluation:
                captures.append(Capture(span, trainer.store, window.start))
        places: list[int] = []
        for chunk, _ in rows.chunks:
            table, end = chunk.sequence.block_table, chunk.start + chunk.num_tokens
            places += range(chunk.start, end)
            blocks += [table[i // size] for i in range(chunk.start, end)]
            offsets += [i % size for i in range(chunk.start, end)]
        positions.append(to_device(torch.tensor(places, dtype=torch.int64), self._device))
        runs = self.adapter_runs(rows)
        sites = frozenset().union(*(run.weights.sites for run in runs))
        kept = frozenset().union(*(self._trainer(work).policies.reserve.labels for work, _ in rows.forwards))
        context = ForwardContext(
            positions=torch.cat(positions),
            slots=self._cache.slots(blocks, offsets),
            program=self._programs.get(sites, kept if captures else frozenset()),
            attention=self._attention(rows),
            adapters=runs,
            captures=captures,
        )
        context.low_rank = low_rank_of(runs, self._model.weights, self._adapters)
        return context

    def adapter_runs(self, rows: Rows) -> list[AdapterRun]:
        """Of training windows each its own; of requests runs of neighbouring rows with the same adapter."""
        training = [self._trainer(work).adapter_run(work.window, span.start) for work, span in rows.forwards]
        serving = runs_of((span.start, span.stop, self.adapter(c.sequence)) for c, span in rows.chunks)
        for run in serving:
            if run.weights.num_virtual_tokens:
                run.virtual = _virtual_rows(run, rows, self._device)
        return training + serving

    def adapter(self, sequence: Sequence) -> AdapterWeights | None:
        return None if sequence.adapter is None else self._adapters.get(sequence.adapter)

    def _attention(self, rows: Rows) -> Attention:
        windows = [(self._trainer(work), work.window, span) for work, span in rows.forwards]
        stream = Stream(windows, rows.prompts, rows.decodes)
        return attention_of(stream, self._cache, self._model.weights.kernels, self._model.config.num_heads)

    def _trainer(self, work: JobWindow) -> Trainer:
        return self._trainers[work.job.job_id]


def _fill_in_pending(tokens: Tensor, rows: Rows, drawn: Drawn | None) -> None:
    """Puts tokens that the batch before has drawn, and nobody has read yet, where they are computed."""
    pending = [(span.stop - 1, chunk.sequence) for chunk, span in rows.chunks if chunk.ends_pending]
    if pending:
        assert drawn is not None
        places = torch.tensor([[at, drawn.row_of[sequence]] for at, sequence in pending])
        at, row = to_device(places.T.contiguous(), tokens.device)
        tokens.index_copy_(0, at, drawn.tokens.index_select(0, row))


def _virtual_rows(run: AdapterRun, rows: Rows, device: torch.device) -> VirtualRows | None:
    places: list[int] = []
    tokens: list[int] = []
    for chunk, span in rows.chunks:
        if run.start <= span.start < run.end:
            virtual = range(chunk.start, min(chunk.start + chunk.num_tokens, run.weights.num_virtual_tokens))
            places += [span.start + token - chunk.start for token in virtual]
            tokens += virtual
    if not places:
        return None
    placed, own = (to_device(torch.tensor(values), device) for values in (places, tokens))
    return VirtualRows(placed, own)
