"""Computes a batch: one fused forward over everybody's tokens, sampling, then backward windows and updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.batch import Batch, Chunk, JobWindow, LaneTiming, Sampled, Timing, Update
from services.gpu_worker.engine.decode_graphs import DecodeGraphs
from services.gpu_worker.engine.lanes import Gate, Lanes, Progress
from services.gpu_worker.engine.sampler import logprob_entry, sample
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.stream_attention import Stream, attention_of
from services.gpu_worker.finetune.trainer import StepReport, Trainer, TrainingDiverged
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.adapters import AdapterPool, AdapterWeights
from services.gpu_worker.model.attention import Attention
from services.gpu_worker.model.context import (
    AdapterRun,
    Capture,
    ForwardContext,
    VirtualRows,
)
from services.gpu_worker.model.low_rank import low_rank_of
from services.gpu_worker.model.transformer import Transformer

RECORDING_S = 20.0  # at start-up, at most
LOGPROB_ROWS = 64  # of a prompt whose full logits exist at a time


@dataclass(slots=True)
class RunResult:
    sampled: list[Sampled] = field(default_factory=list)
    reports: list[tuple[str, StepReport]] = field(default_factory=list)  # (job id, report)
    failures: list[tuple[str, Exception]] = field(default_factory=list)  # (job id, what went wrong)
    num_steps: int = 0  # of the backward, that there was time for
    timing: Timing = field(default_factory=Timing)


@dataclass(slots=True)
class Rows:
    """Who has which rows of the flat stream: training windows, then pieces of prompts, then decodes."""

    forwards: list[tuple[JobWindow, slice]]
    prompts: list[tuple[Chunk, slice]]
    decodes: list[tuple[Chunk, slice]]

    @property
    def chunks(self) -> list[tuple[Chunk, slice]]:
        return self.prompts + self.decodes

    @property
    def are_decodes(self) -> bool:
        return not (self.forwards or self.prompts)


class ModelRunner:
    def __init__(
        self, model: Transformer, cache: KVCache, adapters: AdapterPool, lanes: Lanes | None = None
    ) -> None:
        """Without `lanes` a batch has one."""
        self.model = model
        self.cache = cache
        self.adapters = adapters
        self.lanes = lanes
        self.trainers: dict[str, Trainer] = {}
        self.decode_graphs: DecodeGraphs | None = None
        weights = model.weights
        self._programs = ForwardPrograms(weights.whole, weights.group.size, weights.kernels)

    def record_decodes(self, max_rows: int, max_model_len: int) -> None:
        """From here on forwards over decodes alone are recorded. Nothing may be in the cache yet. Raises ValueError
        for kernels of torch."""
        sizes = max_rows, max_model_len, self.adapters.capacity
        self.decode_graphs = DecodeGraphs(self.model, self.cache, self._programs, *sizes)
        if self.device.type == "cuda":
            self.decode_graphs.record_ahead(RECORDING_S)

    @property
    def device(self) -> torch.device:
        return self.model.weights.device

    def run(self, batch: Batch) -> RunResult:
        """A failure in one job's own windows ends up in `failures` and touches nobody else."""
        result = RunResult()
        for parked in batch.parked:
            park = partial(self.trainers[parked.job.job_id].park, parked.blocks)
            self._guarded(parked.job.job_id, result, park)
        for job in batch.brought_back:
            self._guarded(job.job_id, result, self.trainers[job.job_id].bring_back)
        started = time.perf_counter()
        forwards = self._begin(batch.forwards, result)
        lanes = self._run_lanes(batch, forwards, result)
        for work in forwards:
            if work.ends_evaluation:
                self._guarded(work.job.job_id, result, partial(self._report_evaluation, work, result))
        windows_ms = (time.perf_counter() - started) * 1000
        unfinished = {id(step.job) for step in batch.backwards[result.num_steps :]}
        for update in batch.updates:
            if id(update.job) in unfinished:
                continue
            self._guarded(update.job.job_id, result, partial(self._update, update, result))
        self._synchronize()
        forward_ms, total_ms = lanes[0].forward_ms, (time.perf_counter() - started) * 1000
        result.timing = Timing(forward_ms, windows_ms - forward_ms, total_ms - windows_ms, tuple(lanes))
        return result

    # --- lanes

    def _run_lanes(self, batch: Batch, forwards: list[JobWindow], result: RunResult) -> list[LaneTiming]:
        timings, progress = [LaneTiming(0.0, 0.0)] * batch.num_lanes, Progress()

        def run(lane: int) -> None:
            timings[lane] = self._run_lane(lane, batch, forwards, progress, result)

        if batch.num_lanes == 1:
            run(0)
        else:
            assert self.lanes is not None
            self.lanes.run(run, progress)
        result.num_steps = progress.num_begun
        return timings

    def _run_lane(
        self, lane: int, batch: Batch, forwards: list[JobWindow], progress: Progress, result: RunResult
    ) -> LaneTiming:
        """The lane's forward, then its steps of the backward."""
        self._synchronize()
        started = time.perf_counter()
        self._forward(lane, batch, forwards, progress, result)
        progress.pass_layers(lane, math.inf)
        self._synchronize()
        forwarded, waited_s = time.perf_counter(), progress.waited_s[lane]
        beside = {work.job.job_id for work in forwards if work.lane != lane}
        until_s = started + batch.steps_until_ms / 1000
        for index, step, num_others in batch.backward_steps(lane):
            is_late = time.perf_counter() + step.expected_ms / 1000 > until_s
            if not progress.begin_step(index, is_late):
                break
            if step.job.job_id in beside:
                progress.wait_for_layers(lane, math.inf)
            progress.wait_for_steps(lane, num_others)
            self._guarded(step.job.job_id, result, partial(self._trainer(step).backward, step.window))
            progress.pass_step(lane)
        self._synchronize()
        forward_s = forwarded - started - waited_s
        backward_s = time.perf_counter() - forwarded - (progress.waited_s[lane] - waited_s)
        return LaneTiming(forward_s * 1000, backward_s * 1000)

    def _guarded(self, job_id: str, result: RunResult, work: Callable[[], None]) -> None:
        if any(job_id == failed for failed, _ in result.failures):
            return
        try:
            work()
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if self.model.weights.group.size > 1 and not isinstance(error, TrainingDiverged):
                raise  # this rank's alone, perhaps: the others would wait for it
            result.failures.append((job_id, error))

    def _report_evaluation(self, work: JobWindow, result: RunResult) -> None:
        result.reports.append((work.job.job_id, self._trainer(work).evaluation_report()))

    def _update(self, update: Update, result: RunResult) -> None:
        job_id = update.job.job_id
        report = self.trainers[job_id].optimizer_step(update.start, update.end)
        if report is not None:
            result.reports.append((job_id, report))

    def _trainer(self, work: JobWindow) -> Trainer:
        return self.trainers[work.job.job_id]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- the fused forward

    def _forward(
        self, lane: int, batch: Batch, forwards: list[JobWindow], progress: Progress, result: RunResult
    ) -> None:
        own = [work for work in forwards if work.lane == lane]
        rows = self.lay_out(batch if lane == 0 else Batch(), own)
        if not (rows.forwards or rows.chunks):
            return
        beside = {work.job.job_id for work in forwards if work.lane != lane}
        is_beside_itself = beside.intersection(work.job.job_id for work in own)
        hidden = self.hidden(rows, Gate(progress, lane, follows=lane == 0) if is_beside_itself else None)
        if rows.chunks:
            result.sampled = self._sample(rows, hidden)
        for work, span in rows.forwards:
            trainer = self._trainer(work)
            if lane == 0 and trainer.trains_head and work.job.job_id in beside:
                progress.wait_for_layers(lane, math.inf)
            finish = partial(trainer.finish_forward, work.window, hidden[span])
            self._guarded(work.job.job_id, result, finish)
        for chunk, span in rows.chunks:
            if chunk.sequence.sampling.prompt_logprobs is not None:
                self._prompt_logprobs(chunk, hidden[span])

    def hidden(self, rows: Rows, gate: Gate | None = None) -> Tensor:
        """Hidden states [N, D] of the stream."""
        tokens = self._tokens(rows)
        if self.decode_graphs is not None and rows.are_decodes:
            found = self.decode_graphs.forward(rows.decodes, tokens, self._adapter_runs(rows))
            if found is not None:
                return found
        context = self._context(rows)
        context.gate = gate
        return self.model.forward(tokens, self.cache, context)

    def _tokens(self, rows: Rows) -> Tensor:
        """int64 [N]."""
        tokens = [self._trainer(work).tokens(work.window) for work, _ in rows.forwards]
        flat: list[int] = []
        for chunk, _ in rows.chunks:
            flat += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
        tokens.append(torch.tensor(flat, dtype=torch.int64, device=self.device))
        return torch.cat(tokens)

    def _sample(self, rows: Rows, hidden: Tensor) -> list[Sampled]:
        done = [(chunk.sequence, span.stop - 1) for chunk, span in rows.chunks if chunk.samples]
        if not done:
            return []
        sequences = [sequence for sequence, _ in done]
        runs = _runs((i, i + 1, self._adapter(sequence)) for i, sequence in enumerate(sequences))
        return sample(self.model.logits(hidden[[row for _, row in done]], runs), sequences)

    def _adapter(self, sequence: Sequence) -> AdapterWeights | None:
        return None if sequence.adapter is None else self.adapters.get(sequence.adapter)

    def _begin(self, forwards: list[JobWindow], result: RunResult) -> list[JobWindow]:
        """Takes the training sequences that start here in hand; leaves out jobs that cannot."""
        for work in forwards:
            if work.window.start == 0:
                begin = partial(self._trainer(work).begin, work.sequence)
                self._guarded(work.job.job_id, result, begin)
        failed = {job_id for job_id, _ in result.failures}
        return [work for work in forwards if work.job.job_id not in failed]

    def lay_out(self, batch: Batch, forwards: list[JobWindow]) -> Rows:
        """Decodes are sorted by adapter, so that those who share one are one run of rows."""
        decodes = sorted(batch.decodes, key=lambda sequence: sequence.adapter or "")
        offset = 0

        def span(num_tokens: int) -> slice:
            nonlocal offset
            offset += num_tokens
            return slice(offset - num_tokens, offset)

        return Rows(
            [(work, span(work.window.num_tokens)) for work in forwards],
            [(chunk, span(chunk.num_tokens)) for chunk in batch.prompts],
            [(Chunk(sequence, sequence.num_computed_tokens, 1), span(1)) for sequence in decodes],
        )

    def _context(self, rows: Rows) -> ForwardContext:
        positions: list[Tensor] = []
        blocks: list[int] = []
        offsets: list[int] = []
        captures: list[Capture] = []
        size = self.cache.block_size
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
        positions.append(torch.tensor(places, dtype=torch.int64, device=self.device))
        runs = self._adapter_runs(rows)
        sites = frozenset().union(*(run.weights.sites for run in runs))
        kept = frozenset().union(*(self._trainer(work).policies.reserve.labels for work, _ in rows.forwards))
        context = ForwardContext(
            positions=torch.cat(positions),
            slots=self.cache.slots(blocks, offsets),
            program=self._programs.get(sites, kept if captures else frozenset()),
            attention=self._attention(rows),
            adapters=runs,
            captures=captures,
        )
        context.low_rank = low_rank_of(runs, self.model.weights)
        return context

    def _attention(self, rows: Rows) -> Attention:
        windows = [(self._trainer(work), work.window, span) for work, span in rows.forwards]
        stream = Stream(windows, rows.prompts, rows.decodes)
        return attention_of(stream, self.cache, self.model.weights.kernels, self.model.config.num_heads)

    def _adapter_runs(self, rows: Rows) -> list[AdapterRun]:
        """Of training windows each its own; of requests runs of neighbouring rows with the same adapter."""
        training = [self._trainer(work).adapter_run(work.window, span.start) for work, span in rows.forwards]
        serving = _runs((span.start, span.stop, self._adapter(c.sequence)) for c, span in rows.chunks)
        for run in serving:
            if run.weights.num_virtual_tokens:
                run.virtual = self._virtual_rows(run, rows)
        return training + serving

    def _virtual_rows(self, run: AdapterRun, rows: Rows) -> VirtualRows | None:
        places: list[int] = []
        tokens: list[int] = []
        for chunk, span in rows.chunks:
            if run.start <= span.start < run.end:
                virtual = range(
                    chunk.start, min(chunk.start + chunk.num_tokens, run.weights.num_virtual_tokens)
                )
                places += [span.start + token - chunk.start for token in virtual]
                tokens += virtual
        if not places:
            return None
        return VirtualRows(torch.tensor(places, device=self.device), torch.tensor(tokens, device=self.device))

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> None:
        """Row i predicts token i + 1 of the prompt; the first token has no prediction."""
        sequence: Sequence = chunk.sequence
        assert sequence.sampling.prompt_logprobs is not None
        if chunk.start == 0:
            sequence.prompt_logprobs = [None]
        first = max(chunk.start, sequence.num_virtual_tokens)
        last = min(chunk.start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
        count, predicted = max(0, last - first), sequence.tokens[first + 1 : last + 1]
        hidden, adapter = hidden[first - chunk.start :], self._adapter(sequence)
        for start in range(0, count, LOGPROB_ROWS):
            piece = hidden[start : min(start + LOGPROB_ROWS, count)]
            logits = self.model.logits(piece, _runs([(0, len(piece), adapter)]))
            for row, token in zip(torch.log_softmax(logits, -1), predicted[start:], strict=False):
                entry = logprob_entry(row, token, sequence.sampling.prompt_logprobs)
                sequence.prompt_logprobs.append(entry)


def _runs(spans: Iterable[tuple[int, int, AdapterWeights | None]]) -> list[AdapterRun]:
    """(first row, end, adapter) of neighbours, joined where they share an adapter; the base model's are in none."""
    runs: list[AdapterRun] = []
    for start, end, weights in spans:
        if weights is None:
            continue
        if runs and runs[-1].end == start and runs[-1].weights is weights:
            runs[-1].end = end
        else:
            runs.append(AdapterRun(start, end, weights))
    return runs
