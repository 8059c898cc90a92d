"""The hybrid token scheduler: inference takes the tokens it needs, finetuning what the service level leaves.

Every sequence has tokens and a count of those computed; each iteration hands out tokens until they catch up.
Training windows fill the rest of the iteration up to its limit, which is the time until the most urgent
sequence's next token is due. Decides without tensors. Source: FlexLLM (arXiv 2402.18789), section 6.
"""

from __future__ import annotations

import math
from itertools import chain, islice

from services.gpu_worker.engine.batch import Batch, Progress, Sampled, chunk_work, decode_work
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.finetune_scheduler import FinetuneScheduler
from services.gpu_worker.engine.inference_scheduler import InferenceScheduler
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, Work
from services.gpu_worker.engine.limits import Limits
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.engine.prompt_load import PromptLoad
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.sharing import Turn, make_sharing
from services.gpu_worker.finetune.job import FinetuneJob

BACKLOG = 16  # prompts that finetuning leaves time for
CALM = 0.5  # share of time that prompts take, up to which one lane may do for them
ROOM = 4.0  # times as long as they take there, for decodes come in between and others may follow


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        latency: LatencyModel,
        lane_latency: LatencyModel | None = None,
    ) -> None:
        """`lane_latency`: of one of two lanes, where the machine can be used so; requests are then in lane 0."""
        self.config = config
        self.blocks = blocks
        self.latency = latency
        self.lane_latency = lane_latency
        self._current = latency  # of the iteration in hand
        if lane_latency:
            lane_latency.judge_with(latency)
        self._job_blocks = JobBlocks(blocks)
        self.finetuning = FinetuneScheduler(
            self._job_blocks, config.finetune_window, config.min_window, config.patience
        )
        self.inference = InferenceScheduler(config, blocks, self._job_blocks, self.jobs)
        self._prompt_load = PromptLoad()
        self._sharing = make_sharing(config.sharing, config.period)

    @property
    def jobs(self) -> list[FinetuneJob]:
        return self.finetuning.jobs

    @property
    def has_work(self) -> bool:
        return self.inference.has_requests or bool(self.jobs)

    @property
    def waiting(self) -> list[Sequence]:
        return self.inference.waiting

    @property
    def running(self) -> list[Sequence]:
        return self.inference.running

    @property
    def num_preempted(self) -> int:
        """Sequences, since the start."""
        return self.inference.num_preempted

    def add(self, sequence: Sequence) -> None:
        self.inference.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its blocks."""
        self.inference.abort(sequence)

    def add_job(self, job: FinetuneJob) -> None:
        self.finetuning.add(job)

    def remove_job(self, job: FinetuneJob) -> None:
        self.finetuning.remove(job)

    def preempt_jobs(self) -> None:
        """Every job gives up its blocks and the step that it has in hand."""
        for job in self.jobs:
            self._job_blocks.give_up(job)

    # --- one iteration

    def schedule(self, now_s: float) -> Batch:
        """A batch that begins at `now_s`, once those before it are done."""
        decodes = self.inference.decodes()
        limits = Limits.of(decodes, now_s, self.config.idle_ms, self.config.margin)
        has_requests = self.inference.has_requests
        turn = self._sharing.turn(has_requests, bool(self.jobs), limits.is_late)
        batch = Batch(limit_ms=limits.all_ms)
        trains = self.jobs and turn is not Turn.INFERENCE and self.finetuning.pressure < Pressure.PAUSED
        uses_lanes = trains and self._have_lanes_time(turn, decodes, limits, now_s)
        self._current = self.lane_latency if uses_lanes and self.lane_latency else self.latency
        if turn is not Turn.FINETUNING:
            self.inference.fill(batch, decodes, limits, self._current, now_s)
        inference_ms = self._current.forward_ms(batch.inference_work)
        if batch.prompts:
            self._prompt_load.add(inference_ms - self._current.forward_ms(decode_work(batch.decodes)), now_s)
        batch.lanes_ms = [inference_ms, 0.0] if uses_lanes else [inference_ms]
        if trains:
            self._fill(batch, turn, has_requests, now_s)
        if not batch.has_finetuning:
            batch.lanes_ms = [self.latency.forward_ms(batch.inference_work)]
        return batch

    def _have_lanes_time(self, turn: Turn, decodes: list[Sequence], limits: Limits, now_s: float) -> bool:
        """Whether requests can do with one of two lanes: the decodes in their limit, and the prompts that wait in a
        part of the time that they have, while they are not many: put off for long they would be too many in a burst."""
        if self.lane_latency is None or turn is Turn.FINETUNING or not self.inference.has_requests:
            return self.lane_latency is not None
        if self.lane_latency.forward_ms(decode_work(decodes)) > limits.all_ms:
            return False
        if not self.inference.has_backlog:
            return True
        if self._prompt_load.share(now_s) > CALM:
            return False
        return self._prompts_slack_ms(self.lane_latency, Batch(), now_s, ROOM) > 0

    def _fill(self, batch: Batch, turn: Turn, has_requests: bool, now_s: float) -> None:
        update_ms = self.latency.optimizer_ms
        if turn is Turn.FINETUNING:
            self.finetuning.fill_with_a_sequence(batch, self._current, update_ms)
        else:
            batch.limit_ms *= 1 - self._prompt_load.share(now_s)
            batch.limit_ms = min(batch.limit_ms, self._backlog_limit_ms(batch, now_s))
            if batch.num_lanes > 1:  # as long as requests compute, nobody waits for the other lane
                batch.limit_ms = max(batch.limit_ms, batch.lanes_ms[0])
            self.finetuning.fill(batch, self._current, update_ms, forced=not has_requests)

    def give_back(self, batch: Batch, num_steps: int) -> None:
        """Of the batch's steps only the first `num_steps` are computed; call it before `advance`."""
        if num_steps < len(batch.steps):
            self.finetuning.give_back(batch, num_steps)

    def advance(self, batch: Batch, ends_s: float) -> None:
        """Counts what is being computed; the tokens that are drawn, at `ends_s`, have their places from now on."""
        self.inference.advance(batch, ends_s)
        for job in batch.reports:
            job.complete_report()
        for update in batch.updates:
            if update.job.complete_update(update.end):
                self._job_blocks.free(update.job)  # so that jobs take turns where memory holds one of them

    def receive(self, sampled: list[Sampled], now_s: float) -> list[Progress]:
        """Takes an iteration's tokens; returns the sequences that got one or came to their end. Those that were over
        before get none."""
        return self.inference.receive(sampled, now_s)

    def slack_beside_decodes_ms(self, tpot_ms: float) -> float:
        """What as many decodes as may run, half way through their contexts, leave of the time between tokens."""
        decodes = self.config.max_num_seqs
        work = Work(decodes=decodes, keys=decodes * self.config.max_model_len // 2)
        return self.config.margin * tpot_ms - self.latency.forward_ms(work)

    def _backlog_limit_ms(self, batch: Batch, now_s: float) -> float:
        """When finetuning has to stop so that those who wait for a first token, one after the other, get it in
        time."""
        slack_ms = self._prompts_slack_ms(self._current, batch, now_s)
        return self.config.margin * max(0.0, min(self.config.idle_ms, slack_ms))

    def _prompts_slack_ms(
        self, latency: LatencyModel, batch: Batch, now_s: float, times: float = 1.0
    ) -> float:
        """How long those who wait for a first token could go on waiting, if the batch computes what it has of their
        prompts, and the rest takes so many times as long as it would alone."""
        scheduled = {id(chunk.sequence): chunk.num_tokens for chunk in batch.prompts}
        slack_ms, backlog_ms = math.inf, 0.0
        for sequence in islice(chain(self.inference.prompts(), self.inference.waiting), BACKLOG):
            done = sequence.num_computed_tokens + scheduled.get(id(sequence), 0)
            backlog_ms += times * self._prompt_ms(latency, done, sequence.num_tokens)
            slack_ms = min(slack_ms, (sequence.deadline_s - now_s) * 1000 - backlog_ms)
        return slack_ms

    def _prompt_ms(self, latency: LatencyModel, start: int, end: int) -> float:
        """How long the tokens [start, end) of a sequence take in pieces as large as an iteration takes them."""
        piece = self.config.max_num_batched_tokens
        starts = range(start, end, piece)
        return sum(latency.forward_ms(chunk_work(a, min(piece, end - a))) for a in starts)
