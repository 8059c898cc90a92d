"""Computes a batch: one fused forward over everybody's tokens, sampling, then backward windows and updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.batch import Batch, JobWindow, Update
from services.gpu_worker.engine.decode_graphs import Decoded, DecodeGraphs
from services.gpu_worker.engine.in_flight import InFlight, LaneMarks, Mark, OverlapMarks, RunResult
from services.gpu_worker.engine.lanes import Gate, Lanes, Progress
from services.gpu_worker.engine.prompt_logprobs import prompt_logprobs
from services.gpu_worker.engine.rows import Rows, lay_out
from services.gpu_worker.engine.sampler import Drawn, draw, have_penalties, sampling_rows
from services.gpu_worker.engine.side_stream import SideStream
from services.gpu_worker.engine.stream_inputs import StreamInputs
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.context import runs_of
from services.gpu_worker.model.peft import HEAD
from services.gpu_worker.model.transformer import Transformer

RECORDING_S = 20.0  # at start-up, at most
HOST = torch.device("cpu")


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
        self._inputs = StreamInputs(model, cache, adapters, self._programs, self.trainers)

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
        rows = lay_out(batch if lane == 0 else Batch(), own)
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
                adapter = self._inputs.adapter(chunk.sequence)
                flight.readers += prompt_logprobs(self.model, chunk, hidden[span], adapter)

    def decoded(self, rows: Rows) -> Decoded | None:
        """What a recorded forward over decodes alone finds; None where there is none for the batch."""
        if self.decode_graphs is None or not rows.are_decodes:
            return None
        sequences = [chunk.sequence for chunk, _ in rows.decodes]
        sampling = None if have_penalties(sequences) else sampling_rows(sequences, HOST)
        tokens = self._inputs.tokens(rows, self._drawn)
        return self.decode_graphs.decode(rows.decodes, tokens, self._inputs.adapter_runs(rows), sampling)

    def hidden(self, rows: Rows, gate: Gate | None = None) -> Tensor:
        """Hidden states [N, D] of the stream."""
        context = self._inputs.context(rows)
        context.gate = gate
        return self.model.forward(self._inputs.tokens(rows, self._drawn), self.cache, context)

    def _sample(self, rows: Rows, hidden: Tensor, decoded: Decoded | None) -> Drawn | None:
        done = [(chunk.sequence, span.stop - 1) for chunk, span in rows.chunks if chunk.samples]
        if not done:
            return None
        sequences = [sequence for sequence, _ in done]
        runs = runs_of((i, i + 1, self._inputs.adapter(sequence)) for i, sequence in enumerate(sequences))
        if decoded and all(run.weights.low_rank(HEAD) is None for run in runs):
            drawn = decoded.tokens.clone()  # the next batch still reads them
            return draw(decoded.logits, sequences, self._drawn, self._sample_tokens, drawn)
        last = to_device(torch.tensor([row for _, row in done]), self.device)
        logits = self.model.logits(hidden.index_select(0, last), runs)
        return draw(logits, sequences, self._drawn, self._sample_tokens)

    def _begin(self, forwards: list[JobWindow], flight: InFlight) -> list[JobWindow]:
        """Takes the training sequences that start here in hand; leaves out jobs that cannot."""
        for work in forwards:
            if work.window.start == 0:
                begin = partial(self._trainer(work).begin, work.sequence)
                self._guarded(work.job.job_id, flight, begin)
        failed = {job_id for job_id, _ in flight.failures}
        return [work for work in forwards if work.job.job_id not in failed]
