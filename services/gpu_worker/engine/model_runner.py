"""Computes a batch: one fused forward over everybody's tokens, sampling, then steps of training, then updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.batch import Batch, JobWindow, Update
from services.gpu_worker.engine.decode_graphs import Decoded, DecodeGraphs
from services.gpu_worker.engine.in_flight import InFlight, LaneMarks, Mark, OverlapMarks, RunResult
from services.gpu_worker.engine.lanes import Lanes, Progress
from services.gpu_worker.engine.prompt_logprobs import prompt_logprobs
from services.gpu_worker.engine.rows import Rows, lay_out
from services.gpu_worker.engine.sampler import Drawn, draw, have_penalties, sampling_rows
from services.gpu_worker.engine.side_stream import SideStream
from services.gpu_worker.engine.stream_inputs import StreamInputs
from services.gpu_worker.finetune.job import FinetuneJob, Phase
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
        self.side: SideStream | None = None  # of steps
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
        forwards = self._begin(batch, flight)
        if self.side is not None and batch.steps:
            self._run_streams(self.side, batch, forwards, flight)
        else:
            self._run_lanes(batch, forwards, flight)
        flight.windows_ended = Mark(self.device)
        unfinished = {id(step.job) for step in batch.steps[flight.num_steps :]}
        for job in batch.reports:
            if id(job) not in unfinished:
                self._guarded(job.job_id, flight, partial(self._report, job, flight))
        for update in batch.updates:
            if id(update.job) not in unfinished:
                self._guarded(update.job.job_id, flight, partial(self._update, update, flight))
        flight.ended = Mark(self.device)
        return flight

    def _run_streams(
        self, side: SideStream, batch: Batch, forwards: list[JobWindow], flight: InFlight
    ) -> None:
        """The forward, and the steps on the side stream: beside it or, where they may not be, behind it."""
        side.follow()
        started = Mark(self.device)
        self._forward(batch, forwards, flight)
        forwarded = Mark(self.device)
        if batch.interference is None:
            side.follow()
        with side.beside():
            begun = Mark(self.device)
            for step in batch.steps:
                self._guarded(step.job.job_id, flight, partial(self.step, step))
            ended = Mark(self.device)
        side.join()
        flight.num_steps = len(batch.steps)
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
        """The forward in lane 0, then the lane's steps."""
        started, started_s = Mark(self.device), time.perf_counter()
        if lane == 0:
            self._forward(batch, forwards, flight)
        forwarded = Mark(self.device)
        until_s = started_s + batch.steps_until_ms / 1000
        for index, step, num_others in batch.steps_of(lane):
            is_late = time.perf_counter() + step.expected_ms / 1000 > until_s
            if not progress.begin_step(index, is_late):
                break
            progress.wait_for_steps(lane, num_others)
            self._guarded(step.job.job_id, flight, partial(self.step, step))
            progress.pass_step(lane)
        return LaneMarks(started, forwarded, Mark(self.device), progress.waited_s[lane])

    def step(self, step: JobWindow) -> None:
        """One window through one layer, or its loss."""
        trainer, window = self._trainer(step), step.window
        if window.phase is Phase.BACKWARD:
            trainer.backward(window)
        elif window.layer == self.model.config.num_layers:
            trainer.finish_forward(window)
        else:
            trainer.forward(window, self._inputs.context(lay_out(Batch(), [step])))

    def _guarded(self, job_id: str, flight: InFlight, work: Callable[[], None]) -> None:
        """On one of several ranks what fails is this rank's alone, perhaps: the others would wait for it."""
        if self.model.weights.group.size > 1:
            work()
        else:
            flight.guarded(job_id, work)

    def _report(self, job: FinetuneJob, flight: InFlight) -> None:
        flight.reports.append((job.job_id, self.trainers[job.job_id].end_evaluation()))

    def _update(self, update: Update, flight: InFlight) -> None:
        job_id = update.job.job_id
        read_report = self.trainers[job_id].launch_step(update.start, update.end)
        if read_report is not None:
            flight.reports.append((job_id, read_report))

    def _trainer(self, work: JobWindow) -> Trainer:
        return self.trainers[work.job.job_id]

    # --- the fused forward

    def _forward(self, batch: Batch, forwards: list[JobWindow], flight: InFlight) -> None:
        rows = lay_out(batch, forwards)
        if not (rows.forwards or rows.chunks):
            return
        decoded = self.decoded(rows)
        hidden = decoded.hidden if decoded else self.hidden(rows)
        if rows.chunks:
            flight.drawn = self._sample(rows, hidden, decoded)
            self._drawn = flight.drawn or self._drawn
        for work, span in rows.forwards:
            finish = partial(self._trainer(work).finish_forward, work.window, hidden[span])
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

    def hidden(self, rows: Rows) -> Tensor:
        """Hidden states [N, D] of the stream."""
        tokens = self._inputs.tokens(rows, self._drawn)
        return self.model.forward(tokens, self.cache, self._inputs.context(rows))

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

    def _begin(self, batch: Batch, flight: InFlight) -> list[JobWindow]:
        """Takes the training sequences that start here in hand; returns the fused windows, without those of jobs that
        cannot."""
        for work in (*batch.forwards, *batch.steps):
            if work.begins_sequence:
                begin = partial(self._trainer(work).begin, work.sequence)
                self._guarded(work.job.job_id, flight, begin)
        failed = {job_id for job_id, _ in flight.failures}
        return [work for work in batch.forwards if work.job.job_id not in failed]
