"""The hybrid token scheduler: inference takes the tokens it needs, finetuning what the service level leaves.

Every sequence has tokens and a count of those computed; each iteration hands out tokens until they catch up.
Training windows fill the rest of the iteration up to its limit, which is the time until the most urgent
sequence's next token is due. Decides without tensors. Source: FlexLLM (arXiv 2402.18789), section 6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.gpu_worker.engine.batch import Batch, Chunk, JobWindow, Sampled, chunk_work, window_work
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, Work, largest
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.finetune.job import FinetuneJob, Phase


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512  # inference tokens of one iteration
    max_model_len: int = 2048
    min_prompt_tokens: int = 32  # of prompts, computed in an iteration whatever its limit
    finetune_window: int = 256  # largest window, tokens
    min_window: int = 32  # smaller pieces of work cost more than they bring
    idle_ms: float = 250.0  # longest iteration when nobody waits: an arrival waits at most this
    margin: float = 0.9  # share of the slack that is planned for
    patience: int = 10  # iterations without finetuning before a smallest window is taken regardless


@dataclass(frozen=True, slots=True)
class Progress:
    """What an iteration meant for one sequence."""

    sequence: Sequence
    sampled: Sampled | None
    finish: str | None  # stop, length


class Scheduler:
    def __init__(self, config: SchedulerConfig, blocks: BlockManager, latency: LatencyModel) -> None:
        self.config = config
        self.blocks = blocks
        self.latency = latency
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.jobs: list[FinetuneJob] = []
        self.pressure = Pressure.NONE
        self._job_blocks = JobBlocks(blocks)
        self._starved = 0  # iterations in a row in which jobs got nothing

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.jobs)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def add_job(self, job: FinetuneJob) -> None:
        job.served_tokens = min((other.served_tokens for other in self.jobs), default=0.0)
        self.jobs.append(job)

    def remove_job(self, job: FinetuneJob) -> None:
        self.jobs.remove(job)
        self._job_blocks.free(job)

    def preempt_jobs(self) -> None:
        """Every job gives up its blocks and the step that it has in hand."""
        for job in self.jobs:
            self._job_blocks.give_up(job)

    # --- one iteration

    def schedule(self, now_s: float) -> Batch:
        batch = Batch(limit_ms=self._limit_ms(now_s))
        self._schedule_running(batch)
        self._schedule_waiting(batch)
        batch.predicted_ms = self.latency.forward_ms(batch.forward_work)
        if self.jobs and self.pressure < Pressure.PAUSED:
            batch.limit_ms = min(batch.limit_ms, self._catch_up_limit_ms(batch, now_s))
            self._schedule_finetuning(batch)
        return batch

    def update(self, batch: Batch, sampled: list[Sampled], now_s: float) -> list[Progress]:
        """Counts what was computed; returns the sequences that got a token or came to their end."""
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens += chunk.num_tokens
            if sequence.cache_seed is not None:
                computed = sequence.tokens[: sequence.num_computed_tokens]
                self.blocks.register(
                    sequence.cache_seed, computed, sequence.block_table, sequence.block_hashes
                )
        for job in batch.optimizer_steps:
            job.complete_step()
            self._job_blocks.free(job)  # so that jobs take turns where memory holds one of them
        return [self._advance(item, now_s) for item in sampled]

    def slack_beside_decodes_ms(self, tpot_slo_ms: float) -> float:
        """What as many decodes as may run, half way through their contexts, leave of the time between tokens."""
        decodes = self.config.max_num_seqs
        work = Work(decodes=decodes, keys=decodes * self.config.max_model_len // 2)
        return self.config.margin * tpot_slo_ms - self.latency.forward_ms(work)

    def _limit_ms(self, now_s: float) -> float:
        """How long this iteration may take: until the most urgent decode is due, or the idle bound.

        Whoever is late with a prompt is not helped by smaller pieces of it, so prompts set no limit here.
        """
        slack_ms = [(s.deadline_s() - now_s) * 1000 for s in self.running if s.num_uncomputed_tokens == 1]
        return self.config.margin * max(0.0, min([*slack_ms, self.config.idle_ms]))

    def _catch_up_limit_ms(self, batch: Batch, now_s: float) -> float:
        """When finetuning has to stop so that those who catch up with their prompts are in time."""
        scheduled = {chunk.sequence: chunk.num_tokens for chunk in batch.chunks}
        limit_ms = self.config.idle_ms
        for sequence in (*self.running, *self.waiting):
            if sequence.num_uncomputed_tokens > 1 or sequence not in scheduled:
                done = sequence.num_computed_tokens + scheduled.get(sequence, 0)
                slack_ms = (sequence.deadline_s() - now_s) * 1000
                limit_ms = min(limit_ms, slack_ms - self._catch_up_ms(done, sequence.num_tokens))
        return self.config.margin * max(0.0, limit_ms)

    def _catch_up_ms(self, start: int, end: int) -> float:
        """How long the tokens [start, end) of a sequence take in pieces as large as an iteration takes them."""
        piece = self.config.max_num_batched_tokens
        starts = range(start, end, piece)
        return sum(self.latency.forward_ms(chunk_work(a, min(piece, end - a))) for a in starts)

    # --- inference

    def _schedule_running(self, batch: Batch) -> None:
        """Decodes first, so that no prompt takes their tokens."""
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed_tokens > 1):
            if sequence in self.running:  # else it was preempted for another
                self._schedule_sequence(batch, sequence)

    def _schedule_waiting(self, batch: Batch) -> None:
        """First come, first served: nobody overtakes a sequence that does not fit."""
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            if self._room(batch) <= 0 or not self._admit(sequence):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            if not self._schedule_sequence(batch, sequence):
                return

    def _room(self, batch: Batch) -> int:
        return self.config.max_num_batched_tokens - batch.num_inference_tokens

    def _schedule_sequence(self, batch: Batch, sequence: Sequence) -> bool:
        """Adds the sequence's next tokens: a decode always, of prompts what fits, but together not too little."""
        num_tokens = min(sequence.num_uncomputed_tokens, self._room(batch))
        if num_tokens > 1:
            beside, start = batch.forward_work, sequence.num_computed_tokens
            fitting = self._largest_beside(beside, batch.limit_ms, num_tokens, lambda n: chunk_work(start, n))
            least = max(0, self.config.min_prompt_tokens - beside.window_tokens)
            num_tokens = max(fitting, min(num_tokens, least))
        if num_tokens <= 0 or not self._grow(batch, sequence, sequence.num_computed_tokens + num_tokens):
            return False
        batch.chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
        return True

    def _largest_beside(self, beside: Work, limit_ms: float, most: int, work: Callable[[int], Work]) -> int:
        """The most tokens n whose `work(n)` fits into one forward with the work `beside` it."""
        return largest(most, lambda n: self.latency.forward_ms(beside + work(n)) <= limit_ms)

    def _admit(self, sequence: Sequence) -> bool:
        """Takes what the prefix cache has; False where the rest of the prompt would not fit."""
        if sequence.cache_seed is not None and sequence.sampling.prompt_logprobs is None:
            blocks, hashes = self.blocks.match_prefix(sequence.cache_seed, sequence.tokens)
            sequence.block_table, sequence.block_hashes = blocks, hashes
        needed = self.blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        reclaimable = sum(len(job.blocks) for job in self.jobs)
        if needed > self.blocks.num_free_blocks + reclaimable:
            self._release(sequence)
            return False
        sequence.num_computed_tokens = len(sequence.block_table) * self.blocks.block_size
        if sequence.num_output_tokens == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _grow(self, batch: Batch, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens`; takes them from jobs, then from the newest sequences."""
        needed = self.blocks.blocks_for(num_tokens) - len(sequence.block_table)
        while not self.blocks.can_allocate(needed):
            if self._job_blocks.reclaim(self.jobs, batch):
                continue
            victim = self.running[-1]
            self._preempt(victim)
            batch.chunks = [chunk for chunk in batch.chunks if chunk.sequence is not victim]
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(max(0, needed))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; computed again later, from what the prefix cache still has."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table, sequence.block_hashes = [], []
        sequence.num_computed_tokens = 0

    def _advance(self, item: Sampled, now_s: float) -> Progress:
        sequence, sampling = item.sequence, item.sequence.sampling
        if sampling.max_tokens == 0:
            return self._finish(sequence, None, "length")
        if item.token in sampling.stop_token_ids:
            return self._finish(sequence, None, "stop")
        sequence.tokens.append(item.token)
        sequence.last_token_s = now_s
        full = sequence.num_tokens >= self.config.max_model_len
        if full or sequence.num_output_tokens >= sampling.max_tokens:
            return self._finish(sequence, item, "length")
        return Progress(sequence, item, None)

    def _finish(self, sequence: Sequence, item: Sampled | None, reason: str) -> Progress:
        self.abort(sequence)
        return Progress(sequence, item, reason)

    # --- finetuning

    def _schedule_finetuning(self, batch: Batch) -> None:
        """Least served job first; each adds work until the iteration is full."""
        forced = self._starved >= self.config.patience or not (self.running or self.waiting)
        for job in sorted(self.jobs, key=lambda job: job.served_tokens):
            if job.parked and not self._job_blocks.bring_back(job, batch):
                continue
            if job.phase is Phase.FORWARD:
                self._add_forward(batch, job, forced)
            if job.phase is Phase.BACKWARD:
                self._add_backwards(batch, job, forced)
            if job.phase is Phase.OPTIMIZER and self._fits(batch, self.latency.optimizer_ms, forced):
                batch.optimizer_steps.append(job)
                batch.predicted_ms += self.latency.optimizer_ms
        idle = not (batch.forwards or batch.backwards or batch.optimizer_steps)
        self._starved = self._starved + 1 if idle else 0

    def _fits(self, batch: Batch, cost_ms: float, forced: bool) -> bool:
        return forced or batch.predicted_ms + cost_ms <= batch.limit_ms

    @property
    def _largest_window(self) -> int:
        return self.config.finetune_window if self.pressure is Pressure.NONE else self.config.min_window

    def _add_forward(self, batch: Batch, job: FinetuneJob, forced: bool) -> None:
        if job.position == 0 and not self._job_blocks.reserve(job):
            return
        sequence, evaluating, start, beside = job.sequence, job.evaluating, job.position, batch.forward_work
        others_ms = batch.predicted_ms - self.latency.forward_ms(beside)
        most = min(job.remaining_forward, self._largest_window)
        size = self._largest_beside(
            beside, batch.limit_ms - others_ms, most, lambda n: window_work(sequence, start, start + n)
        )
        size = self._acceptable(size, most, forced)
        if not size:
            return
        window = job.next_forward(size)
        job.complete(window)
        batch.forwards.append(JobWindow(job, sequence, window, evaluating and not job.evaluating))
        batch.predicted_ms = others_ms + self.latency.forward_ms(batch.forward_work)

    def _add_backwards(self, batch: Batch, job: FinetuneJob, forced: bool) -> None:
        sequence = job.sequence
        while job.phase is Phase.BACKWARD:
            most = min(job.position, self._largest_window)
            size = self._largest_backward(job, batch.limit_ms - batch.predicted_ms, most)
            size = self._acceptable(size, most, forced and not batch.backwards)
            if not size:
                return
            work = JobWindow(job, sequence, job.next_backward(size))
            job.complete(work.window)
            batch.backwards.append(work)
            batch.predicted_ms += self.latency.backward_ms(work.work)

    def _largest_backward(self, job: FinetuneJob, budget_ms: float, most: int) -> int:
        sequence, end = job.sequence, job.position
        return largest(
            most, lambda n: self.latency.backward_ms(window_work(sequence, end - n, end)) <= budget_ms
        )

    def _acceptable(self, size: int, most: int, forced: bool) -> int:
        """`size`, or nothing where it is a crumb; the smallest window where a job has waited too long."""
        smallest = min(self.config.min_window, most)
        if size >= smallest:
            return size
        return smallest if forced else 0
