"""Computes a batch: one fused forward over everybody's tokens, sampling, then backward windows and updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.batch import Batch, Chunk, JobWindow, Update
from services.gpu_worker.engine.decode_graphs import Decoded, DecodeGraphs
from services.gpu_worker.engine.in_flight import InFlight, LaneMarks, Mark, OverlapMarks, RunResult
from services.gpu_worker.engine.lanes import Gate, Lanes, Progress
from services.gpu_worker.engine.sampler import Drawn, LogprobRows, draw, have_penalties, sampling_rows
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.side_stream import SideStream
from services.gpu_worker.engine.stream_attention import Stream, attention_of
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.attention import Attention
from services.gpu_worker.model.context import (
    AdapterRun,
    Capture,
    ForwardContext,
    VirtualRows,
)
from services.gpu_worker.model.low_rank import low_rank_of
from services.gpu_worker.model.peft import HEAD
from services.gpu_worker.model.transformer import Transformer

RECORDING_S = 20.0  # at start-up, at most
LOGPROB_ROWS = 64  # of a prompt whose full logits exist at a time
HOST = torch.device("cpu")


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
        self.side: SideStream | None = None  # of the backward
        self.trainers: dict[str, Trainer] = {}
        self._drawn: Drawn | None = None  # by the last batch that drew tokens
        kernels = model.weights.kernels  # a CPU draws row by row, and sorts few of them
        self._sample_tokens = (
            kernels.sample_tokens if kernels.is_triton or self.device.type == "cuda" else None
        )
        self.decode_graphs: DecodeGraphs | None = None
        weights = model.weights
        self._programs = ForwardPrograms(weights.whole, weights.group.size, weights.kernels)

    def record_decodes(self, max_rows: int, max_model_len: int, budget: int) -> None:
        """From here on forwards over decodes alone are recorded, in `budget` bytes of the device. Nothing may be in the
        cache yet. Raises ValueError for kernels of torch."""
        sizes = max_rows, max_model_len, self.adapters.capacity, budget
        self.decode_graphs = DecodeGraphs(self.model, self.cache, self._programs, *sizes)
        if self.device.type == "cuda":
            self.decode_graphs.record_ahead(RECORDING_S)

    @property
    def device(self) -> torch.device:
        return self.model.weights.device

    def run(self, batch: Batch) -> RunResult:
        return self.launch(batch).collect()

    def launch(self, batch: Batch) -> InFlight:
        """Gives the device all that a batch computes, in one stream behind the batches before it."""
        flight = InFlight(batch, Mark(self.device))
        for parked in batch.parked:
            park = partial(self.trainers[parked.job.job_id].park, parked.blocks)
            self._guarded(parked.job.job_id, flight, park)
        for job in batch.brought_back:
            self._guarded(job.job_id, flight, self.trainers[job.job_id].bring_back)
        forwards = self._begin(batch.forwards, flight)
        if self.side is not None and batch.backwards:
            self._run_streams(self.side, batch, forwards, flight)
        else:
            self._run_lanes(batch, forwards, flight)
        for work in forwards:
            if work.ends_evaluation:
                self._guarded(work.job.job_id, flight, partial(self._report_evaluation, work, flight))
        flight.windows_ended = Mark(self.device)
        unfinished = {id(step.job) for step in batch.backwards[flight.num_steps :]}
        for update in batch.updates:
            if id(update.job) not in unfinished:
                self._guarded(update.job.job_id, flight, partial(self._update, update, flight))
        flight.ended = Mark(self.device)
        return flight

    def _run_streams(
        self, side: SideStream, batch: Batch, forwards: list[JobWindow], flight: InFlight
    ) -> None:
        """The forward, and the backward on the side stream: beside it or, where it may not be, behind it."""
        side.follow()
        started = Mark(self.device)
        self._forward(0, batch, forwards, Progress(), flight)
        forwarded = Mark(self.device)
        if batch.interference is None:
            side.follow()
        with side.beside():
            begun = Mark(self.device)
            for step in batch.backwards:
                work = partial(self._trainer(step).backward, step.window)
                self._guarded(step.job.job_id, flight, work)
            ended = Mark(self.device)
        side.join()
        flight.num_steps = len(batch.backwards)
        flight.lanes = [OverlapMarks(started, forwarded, begun, ended, batch.interference)]

    # --- lanes

    def _run_lanes(self, batch: Batch, forwards: list[JobWindow], flight: InFlight) -> None:
        progress, marks = Progress(), dict[int, LaneMarks]()

        def run(lane: int) -> None:
            marks[lane] = self._run_lane(lane, batch, forwards, progress, flight)

        if batch.num_lanes == 1:
            run(0)
        else:
            assert self.lanes is not None
            self.lanes.run(run, progress)
        flight.num_steps = progress.num_begun
        flight.lanes = [marks[lane] for lane in range(batch.num_lanes)]

    def _run_lane(
        self, lane: int, batch: Batch, forwards: list[JobWindow], progress: Progress, flight: InFlight
    ) -> LaneMarks:
        """The lane's forward, then its steps of the backward."""
        started, started_s = Mark(self.device), time.perf_counter()
        self._forward(lane, batch, forwards, progress, flight)
        progress.pass_layers(lane, math.inf)
        forwarded, waited_s = Mark(self.device), progress.waited_s[lane]
        beside = {work.job.job_id for work in forwards if work.lane != lane}
        until_s = started_s + batch.steps_until_ms / 1000
        for index, step, num_others in batch.backward_steps(lane):
            is_late = time.perf_counter() + step.expected_ms / 1000 > until_s
            if not progress.begin_step(index, is_late):
                break
            if step.job.job_id in beside:
                progress.wait_for_layers(lane, math.inf)
            progress.wait_for_steps(lane, num_others)
            self._guarded(step.job.job_id, flight, partial(self._trainer(step).backward, step.window))
            progress.pass_step(lane)
        later_s = progress.waited_s[lane] - waited_s
        return LaneMarks(started, forwarded, Mark(self.device), waited_s, later_s)

    def _guarded(self, job_id: str, flight: InFlight, work: Callable[[], None]) -> None:
        """On one of several ranks what fails is this rank's alone, perhaps: the others would wait for it."""
        if self.model.weights.group.size > 1:
            work()
        else:
            flight.guarded(job_id, work)

    def _report_evaluation(self, work: JobWindow, flight: InFlight) -> None:
        flight.reports.append((work.job.job_id, self._trainer(work).end_evaluation()))

    def _update(self, update: Update, flight: InFlight) -> None:
        job_id = update.job.job_id
        read_report = self.trainers[job_id].launch_step(update.start, update.end)
        if read_report is not None:
            flight.reports.append((job_id, read_report))

    def _trainer(self, work: JobWindow) -> Trainer:
        return self.trainers[work.job.job_id]

    # --- the fused forward

    def _forward(
        self, lane: int, batch: Batch, forwards: list[JobWindow], progress: Progress, flight: InFlight
    ) -> None:
        own = [work for work in forwards if work.lane == lane]
        rows = self.lay_out(batch if lane == 0 else Batch(), own)
        if not (rows.forwards or rows.chunks):
            return
        beside = {work.job.job_id for work in forwards if work.lane != lane}
        is_beside_itself = beside.intersection(work.job.job_id for work in own)
        decoded = self.decoded(rows)
        gate = Gate(progress, lane, follows=lane == 0) if is_beside_itself else None
        hidden = decoded.hidden if decoded else self.hidden(rows, gate)
        if rows.chunks:
            flight.drawn = self._sample(rows, hidden, decoded)
            self._drawn = flight.drawn or self._drawn
        for work, span in rows.forwards:
            trainer = self._trainer(work)
            if lane == 0 and trainer.trains_head and work.job.job_id in beside:
                progress.wait_for_layers(lane, math.inf)
            finish = partial(trainer.finish_forward, work.window, hidden[span])
            self._guarded(work.job.job_id, flight, finish)
        for chunk, span in rows.chunks:
            if chunk.sequence.sampling.prompt_logprobs is not None:
                flight.readers += self._prompt_logprobs(chunk, hidden[span])

    def decoded(self, rows: Rows) -> Decoded | None:
        """What a recorded forward over decodes alone finds; None where there is none for the batch."""
        if self.decode_graphs is None or not rows.are_decodes:
            return None
        sequences = [chunk.sequence for chunk, _ in rows.decodes]
        sampling = None if have_penalties(sequences) else sampling_rows(sequences, HOST)
        return self.decode_graphs.decode(rows.decodes, self._tokens(rows), self._adapter_runs(rows), sampling)

    def hidden(self, rows: Rows, gate: Gate | None = None) -> Tensor:
        """Hidden states [N, D] of the stream."""
        context = self._context(rows)
        context.gate = gate
        return self.model.forward(self._tokens(rows), self.cache, context)

    def _tokens(self, rows: Rows) -> Tensor:
        """int64 [N]."""
        tokens = [self._trainer(work).tokens(work.window) for work, _ in rows.forwards]
        flat: list[int] = []
        for chunk, _ in rows.chunks:
            flat += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
        tokens.append(to_device(torch.tensor(flat, dtype=torch.int64), self.device))
        stream = torch.cat(tokens)
        self._fill_in_pending(stream, rows)
        return stream

    def _fill_in_pending(self, tokens: Tensor, rows: Rows) -> None:
        """Puts tokens that the batch before has drawn, and nobody has read yet, where they are computed."""
        pending = [(span.stop - 1, chunk.sequence) for chunk, span in rows.chunks if chunk.ends_pending]
        if pending:
            assert self._drawn is not None
            drawn = torch.tensor([[at, self._drawn.row_of[sequence]] for at, sequence in pending])
            at, row = to_device(drawn.T.contiguous(), self.device)
            tokens.index_copy_(0, at, self._drawn.tokens.index_select(0, row))

    def _sample(self, rows: Rows, hidden: Tensor, decoded: Decoded | None) -> Drawn | None:
        done = [(chunk.sequence, span.stop - 1) for chunk, span in rows.chunks if chunk.samples]
        if not done:
            return None
        sequences = [sequence for sequence, _ in done]
        runs = _runs((i, i + 1, self._adapter(sequence)) for i, sequence in enumerate(sequences))
        if decoded and all(run.weights.low_rank(HEAD) is None for run in runs):
            drawn = decoded.tokens.clone()  # the next batch still reads them
            return draw(decoded.logits, sequences, self._drawn, self._sample_tokens, drawn)
        last = to_device(torch.tensor([row for _, row in done]), self.device)
        logits = self.model.logits(hidden.index_select(0, last), runs)
        return draw(logits, sequences, self._drawn, self._sample_tokens)

    def _adapter(self, sequence: Sequence) -> AdapterWeights | None:
        return None if sequence.adapter is None else self.adapters.get(sequence.adapter)

    def _begin(self, forwards: list[JobWindow], flight: InFlight) -> list[JobWindow]:
        """Takes the training sequences that start here in hand; leaves out jobs that cannot."""
        for work in forwards:
            if work.window.start == 0:
                begin = partial(self._trainer(work).begin, work.sequence)
                self._guarded(work.job.job_id, flight, begin)
        failed = {job_id for job_id, _ in flight.failures}
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
        positions.append(to_device(torch.tensor(places, dtype=torch.int64), self.device))
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
        context.low_rank = low_rank_of(runs, self.model.weights, self.adapters)
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
        placed, own = (to_device(torch.tensor(values), self.device) for values in (places, tokens))
        return VirtualRows(placed, own)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> Iterator[Callable[[], None]]:
        """Row i predicts token i + 1 of the prompt; the first token has no prediction. Gives what reads them."""
        sequence: Sequence = chunk.sequence
        num_top = sequence.sampling.prompt_logprobs
        assert num_top is not None
        if chunk.start == 0:
            yield partial(_begin_prompt_logprobs, sequence)
        first = max(chunk.start, sequence.num_virtual_tokens)
        last = min(chunk.start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
        count = max(0, last - first)
        predicted = to_device(torch.tensor(sequence.tokens[first + 1 : last + 1]), self.device)
        hidden, adapter = hidden[first - chunk.start :], self._adapter(sequence)
        for start in range(0, count, LOGPROB_ROWS):
            piece = hidden[start : min(start + LOGPROB_ROWS, count)]
            logits = self.model.logits(piece, _runs([(0, len(piece), adapter)]))
            tokens = predicted[start : start + len(piece)]
            rows = LogprobRows(torch.log_softmax(logits, -1), tokens, [num_top] * len(piece))
            yield partial(_read_prompt_logprobs, sequence, rows)


def _begin_prompt_logprobs(sequence: Sequence) -> None:
    sequence.prompt_logprobs = [None]


def _read_prompt_logprobs(sequence: Sequence, rows: LogprobRows) -> None:
    sequence.prompt_logprobs += rows.read()


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
