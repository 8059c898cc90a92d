"""Which tokens of which requests an iteration computes: decodes, pieces of prompts, and who gives way to whom."""

from __future__ import annotations

from bisect import insort_left, insort_right

from services.gpu_worker.engine.batch import Batch, Chunk, Progress, Sampled, chunk_work, decode_work
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, largest
from services.gpu_worker.engine.limits import Limits
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.slo import FLEX
from services.gpu_worker.finetune.job import FinetuneJob


class InferenceScheduler:
    """By rank, then first come, first served. Blocks that a request lacks are taken from jobs, then from the newest
    sequence of the highest rank."""

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        job_blocks: JobBlocks,
        jobs: list[FinetuneJob],
    ) -> None:
        """`jobs`: the finetuning scheduler's own list, so that it is always of those that run."""
        self.config = config
        self.blocks = blocks
        self.waiting: list[Sequence] = []  # sorted by _urgency
        self.running: list[Sequence] = []
        self.num_preempted = 0  # sequences, since the start
        self._has_prompts = False  # somebody who runs
        self._job_blocks = job_blocks
        self._jobs = jobs

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def has_backlog(self) -> bool:
        """Somebody waits whose prompt is not computed."""
        return bool(self.waiting or self.prompts())

    def add(self, sequence: Sequence) -> None:
        insort_right(self.waiting, sequence, key=_urgency)

    def abort(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its blocks.

        An iteration under way may still write to these. Whoever gets them writes later: a device computes in the
        order in which it is told to.
        """
        sequence.end()
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    # --- one iteration

    def decodes(self) -> list[Sequence]:
        """Those who have one token to compute, unless their last one is on its way. Asked first in an iteration."""
        decodes = [s for s in self.running if len(s.tokens) == s.num_computed_tokens + 1 and not s.is_ending]
        self._has_prompts = len(decodes) < len(self.running)
        return decodes

    def prompts(self) -> list[Sequence]:
        """Of those who run, the ones that have more than a token to compute."""
        if not self._has_prompts:
            return []
        return [s for s in self.running if len(s.tokens) - s.num_computed_tokens > 1]

    def fill(
        self, batch: Batch, decodes: list[Sequence], limits: Limits, latency: LatencyModel, now_s: float
    ) -> None:
        """The decodes, then prompts up to their limits; `latency` is that of the lane of requests."""
        self._schedule_decodes(batch, decodes, limits, latency, now_s)
        self._schedule_prompts(batch, limits, latency)
        self._schedule_waiting(batch, limits, latency)

    def advance(self, batch: Batch, ends_s: float) -> None:
        """Counts what is being computed; the tokens that are drawn, at `ends_s`, have their places from now on."""
        for sequence in batch.decodes:
            self._advance(sequence, 1, ends_s)
        for chunk in batch.prompts:
            self._advance(chunk.sequence, chunk.num_tokens, ends_s)

    def receive(self, sampled: list[Sampled], now_s: float) -> list[Progress]:
        """Takes an iteration's tokens; returns the sequences that got one or came to their end. Those that were over
        before get none."""
        return [self._receive(item, now_s) for item in sampled if not item.sequence.is_over]

    def _schedule_decodes(
        self, batch: Batch, decodes: list[Sequence], limits: Limits, latency: LatencyModel, now_s: float
    ) -> None:
        """One token of each; of flexible ones, while they have time, no more than leave the others in time."""
        if len(decodes) > self.config.max_num_batched_tokens:
            decodes = sorted(decodes, key=_deadline)[: self.config.max_num_batched_tokens]
        batch.decodes = decodes
        others_ms = limits.by_rank[FLEX - 1]
        if limits.is_mixed and latency.forward_ms(batch.inference_work) > others_ms:
            self._hold_back_flexible(batch, others_ms, latency, now_s)
        size = self.blocks.block_size
        full = [s for s in batch.decodes if s.num_computed_tokens % size == 0]
        for sequence in [s for s in full if len(s.block_table) * size < len(s.tokens)]:
            if sequence in self.running:  # else it was preempted for another
                self._grow(batch, sequence, sequence.num_tokens)

    def _hold_back_flexible(self, batch: Batch, limit_ms: float, latency: LatencyModel, now_s: float) -> None:
        """All flexible decodes that have time, but for those that fit into the others' limit."""
        urgent = [s for s in batch.decodes if s.slo.rank < FLEX or s.deadline_s <= now_s]
        waiting = (s for s in batch.decodes if s not in urgent)
        flexible = sorted(waiting, key=_deadline)  # so that they take turns
        fitting = largest(
            len(flexible),
            lambda n: latency.forward_ms(decode_work(urgent + flexible[:n])) <= limit_ms,
        )
        for sequence in flexible[fitting:]:
            batch.drop(sequence)

    def _schedule_prompts(self, batch: Batch, limits: Limits, latency: LatencyModel) -> None:
        for sequence in sorted(self.prompts(), key=_rank):
            if sequence in self.running:  # else it was preempted for another
                self._schedule_piece(batch, sequence, limits, latency)

    def _schedule_waiting(self, batch: Batch, limits: Limits, latency: LatencyModel) -> None:
        """By rank, then first come, first served: nobody overtakes a sequence that does not fit."""
        while self.waiting and self._room(batch) > 0 and self._admit(batch, self.waiting[0]):
            sequence = self.waiting.pop(0)
            self.running.append(sequence)
            self._has_prompts = True
            if not self._schedule_piece(batch, sequence, limits, latency):
                return

    def _room(self, batch: Batch) -> int:
        return self.config.max_num_batched_tokens - batch.num_inference_tokens

    def _schedule_piece(
        self, batch: Batch, sequence: Sequence, limits: Limits, latency: LatencyModel
    ) -> bool:
        """Adds the prompt's next tokens: what fits, but of all prompts together not too little."""
        start = sequence.num_computed_tokens
        most = min(sequence.num_uncomputed_tokens, self._room(batch))
        beside, limit_ms = batch.inference_work, limits.by_rank[sequence.slo.rank]
        fitting = largest(most, lambda n: latency.forward_ms(beside + chunk_work(start, n)) <= limit_ms)
        least = max(0, self.config.min_prompt_tokens - beside.window_tokens)
        num_tokens = max(fitting, min(most, least))
        if num_tokens <= 0 or not self._grow(batch, sequence, start + num_tokens):
            return False
        batch.prompts.append(Chunk(sequence, start, num_tokens))
        return True

    # --- admission and preemption

    def _admit(self, batch: Batch, sequence: Sequence) -> bool:
        """Takes what the prefix cache has; False where there is no place, or no memory for the rest."""
        is_full = len(self.running) >= self.config.max_num_seqs
        if is_full and not self._preempt_for(batch, sequence):
            return False
        if sequence.cache_seed is not None and sequence.sampling.prompt_logprobs is None:
            blocks, hashes = self.blocks.match_prefix(sequence.cache_seed, sequence.tokens)
            sequence.block_table, sequence.block_hashes = blocks, hashes
        needed = self.blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        reclaimable = sum(len(job.blocks) for job in self._jobs)
        while needed > self.blocks.num_free_blocks + reclaimable:
            if not self._preempt_for(batch, sequence):
                self._release(sequence)
                return False
        sequence.num_computed_tokens = len(sequence.block_table) * self.blocks.block_size
        if sequence.num_tokens == sequence.num_prompt_tokens:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _preempt_for(self, batch: Batch, sequence: Sequence) -> bool:
        """Only flexible sequences give way to others; False where there is none."""
        victim = self._newest_of_highest_rank()
        if victim is None or victim.slo.rank < FLEX or sequence.slo.rank == FLEX:
            return False
        self._preempt(batch, victim)
        return True

    def _newest_of_highest_rank(self) -> Sequence | None:
        return max(reversed(self.running), key=_rank, default=None)

    def _grow(self, batch: Batch, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens`; takes them from jobs, then from sequences, and returns False where
        this one was the next to give its own."""
        needed = self.blocks.blocks_for(num_tokens) - len(sequence.block_table)
        while not self.blocks.can_allocate(needed):
            if self._job_blocks.reclaim(self._jobs, batch):
                continue
            victim = self._newest_of_highest_rank()
            assert victim is not None, "a sequence that grows is running"
            self._preempt(batch, victim)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.block_table += self.blocks.allocate(needed)
        return True

    def _preempt(self, batch: Batch, sequence: Sequence) -> None:
        """Back to the head of its rank; computed again later, from what the prefix cache still has."""
        self.num_preempted += 1
        batch.drop(sequence)
        self.running.remove(sequence)
        self._release(sequence)
        insort_left(self.waiting, sequence, key=_urgency)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table, sequence.block_hashes = [], []
        sequence.num_computed_tokens = 0

    def _register(self, sequence: Sequence) -> None:
        """Makes blocks that have become full, of known tokens, findable. Who finds one reads it after it is written:
        in a later iteration."""
        num_known = len(sequence.tokens) - sequence.num_pending_tokens
        num_computed = min(sequence.num_computed_tokens, num_known)
        is_full = num_computed // self.blocks.block_size > len(sequence.block_hashes)
        if is_full and sequence.cache_seed is not None:
            computed = sequence.tokens[:num_computed]
            self.blocks.register(sequence.cache_seed, computed, sequence.block_table, sequence.block_hashes)

    # --- what was computed

    def _advance(self, sequence: Sequence, num_tokens: int, ends_s: float) -> None:
        sequence.num_computed_tokens += num_tokens
        if sequence.num_computed_tokens == len(sequence.tokens):
            sequence.expect(ends_s)
            most = sequence.num_prompt_tokens + sequence.sampling.max_tokens
            sequence.is_ending = len(sequence.tokens) >= min(most, self.config.max_model_len)
        self._register(sequence)

    def _receive(self, item: Sampled, now_s: float) -> Progress:
        sequence, sampling = item.sequence, item.sequence.sampling
        if sampling.max_tokens == 0:
            return self._finish(sequence, None, "length")
        if item.token in sampling.stop_token_ids:
            return self._finish(sequence, None, "stop")
        sequence.fill(item.token, now_s)
        if sequence.is_ending and not sequence.num_pending_tokens:
            return self._finish(sequence, item, "length")
        return Progress(sequence, item, None)

    def _finish(self, sequence: Sequence, item: Sampled | None, reason: str) -> Progress:
        self._register(sequence)
        self.abort(sequence)
        return Progress(sequence, item, reason)


def _deadline(sequence: Sequence) -> float:
    return sequence.deadline_s


def _rank(sequence: Sequence) -> int:
    return sequence.slo.rank


def _urgency(sequence: Sequence) -> tuple[int, float]:
    return sequence.slo.rank, sequence.arrival_s
