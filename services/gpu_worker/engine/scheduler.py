"""The hybrid token scheduler: inference takes the tokens it needs, finetuning what the service level leaves.

Every sequence has tokens and a count of those computed; each iteration hands out tokens until they catch up.
Training windows fill the rest of the iteration up to its limit, which is the time until the most urgent
sequence's next token is due. Decides without tensors. Source: FlexLLM (arXiv 2402.18789), section 6.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from dataclasses import dataclass
from itertools import chain, islice

from services.gpu_worker.engine.batch import Batch, Chunk, Sampled, chunk_work, decode_work
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.finetune_scheduler import FinetuneScheduler
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, Work, largest
from services.gpu_worker.engine.limits import Limits
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.engine.sequence import AIM, Sequence
from services.gpu_worker.engine.sharing import SharingName, Turn, make_sharing
from services.gpu_worker.engine.slo import FLEX
from services.gpu_worker.finetune.job import FinetuneJob, Phase

BACKLOG = 16  # prompts that finetuning leaves time for
LEAST_SHARE = 0.1  # of the time that prompts get beside decodes


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512  # inference tokens of one iteration
    max_model_len: int = 2048
    min_prompt_tokens: int = 32  # of prompts, computed in an iteration whatever its limit
    finetune_window: int = 1024  # largest window, tokens
    min_window: int = 32  # smaller pieces of work cost more than they bring
    idle_ms: float = 250.0  # longest iteration when nobody waits: an arrival waits at most this
    margin: float = (
        0.95  # share of the slack that is planned for; the rest is for what lies between iterations
    )
    patience: int = 10  # iterations without finetuning before a smallest window is taken regardless
    sharing: SharingName = "coserve"
    period: int = 64  # of temporal sharing, iterations


@dataclass(slots=True)  # not frozen, which takes longer to make: there is one for every token
class Progress:
    """What an iteration meant for one sequence."""

    sequence: Sequence
    sampled: Sampled | None
    finish: str | None  # stop, length


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
        self.waiting: list[Sequence] = []  # sorted by _urgency
        self.running: list[Sequence] = []
        self.num_preempted = 0  # sequences, since the start
        self._has_prompts = False  # somebody who runs
        self._job_blocks = JobBlocks(blocks)
        self.finetuning = FinetuneScheduler(
            self._job_blocks, config.finetune_window, config.min_window, config.patience
        )
        self._sharing = make_sharing(config.sharing, config.period)

    @property
    def jobs(self) -> list[FinetuneJob]:
        return self.finetuning.jobs

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.jobs)

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
        decodes = [s for s in self.running if len(s.tokens) == s.num_computed_tokens + 1 and not s.is_ending]
        self._has_prompts = len(decodes) < len(self.running)
        limits = Limits.of(decodes, now_s, self.config.idle_ms, self.config.margin)
        has_requests = bool(self.running or self.waiting)
        turn = self._sharing.turn(has_requests, bool(self.jobs), limits.is_late)
        batch = Batch(limit_ms=limits.all_ms)
        trains = self.jobs and turn is not Turn.INFERENCE and self.finetuning.pressure < Pressure.PAUSED
        uses_lanes = trains and self._have_lanes_time(turn, decodes, limits, now_s)
        self._current = self.lane_latency if uses_lanes and self.lane_latency else self.latency
        if turn is not Turn.FINETUNING:
            self._schedule_decodes(batch, decodes, limits, now_s)
            self._schedule_prompts(batch, limits)
            self._schedule_waiting(batch, limits)
        inference_ms = self._current.forward_ms(batch.inference_work)
        batch.lanes_ms = [inference_ms, 0.0] if uses_lanes else [inference_ms]
        if trains:
            self._fill(batch, turn, has_requests, now_s)
        if not batch.has_finetuning:
            batch.lanes_ms = [self.latency.forward_ms(batch.inference_work)]
        return batch

    def _have_lanes_time(self, turn: Turn, decodes: list[Sequence], limits: Limits, now_s: float) -> bool:
        """Whether requests can do with one of two lanes. Beside them a forward is better fused with theirs, for small
        windows are slow on their own; a backward has many small products, which spread badly over cores."""
        if self.lane_latency is None or turn is Turn.FINETUNING or not (self.running or self.waiting):
            return self.lane_latency is not None
        if self.finetuning.first_in_turn.phase is Phase.FORWARD:
            return False
        self._current = self.lane_latency
        decodes_ms = self.lane_latency.forward_ms(decode_work(decodes))
        backlog_limit_ms = self._backlog_limit_ms(Batch(decodes=decodes), now_s)
        return decodes_ms <= limits.all_ms and backlog_limit_ms > decodes_ms

    def _fill(self, batch: Batch, turn: Turn, has_requests: bool, now_s: float) -> None:
        update_ms = self.latency.optimizer_ms
        if turn is Turn.FINETUNING:
            self.finetuning.fill_with_a_sequence(batch, self._current, update_ms)
        else:
            batch.limit_ms = min(batch.limit_ms, self._backlog_limit_ms(batch, now_s))
            self.finetuning.fill(batch, self._current, update_ms, forced=not has_requests)

    def give_back(self, batch: Batch, num_steps: int) -> None:
        """Of the batch's backward only the first `num_steps` steps are computed; call it before `advance`."""
        if num_steps < len(batch.backwards):
            self.finetuning.give_back(batch, num_steps)

    def advance(self, batch: Batch, ends_s: float) -> None:
        """Counts what is being computed; the tokens that are drawn, at `ends_s`, have their places from now on."""
        for sequence in batch.decodes:
            self._advance(sequence, 1, ends_s)
        for chunk in batch.prompts:
            self._advance(chunk.sequence, chunk.num_tokens, ends_s)
        for update in batch.updates:
            if update.job.complete_update(update.end):
                self._job_blocks.free(update.job)  # so that jobs take turns where memory holds one of them

    def _advance(self, sequence: Sequence, num_tokens: int, ends_s: float) -> None:
        sequence.num_computed_tokens += num_tokens
        if sequence.num_computed_tokens == len(sequence.tokens):
            sequence.expect(ends_s)
            most = sequence.num_prompt_tokens + sequence.sampling.max_tokens
            sequence.is_ending = len(sequence.tokens) >= min(most, self.config.max_model_len)
        self._register(sequence)

    def receive(self, sampled: list[Sampled], now_s: float) -> list[Progress]:
        """Takes an iteration's tokens; returns the sequences that got one or came to their end. Those that were over
        before get none."""
        return [self._receive(item, now_s) for item in sampled if not item.sequence.is_over]

    def slack_beside_decodes_ms(self, tpot_ms: float) -> float:
        """What as many decodes as may run, half way through their contexts, leave of the time between tokens."""
        decodes = self.config.max_num_seqs
        work = Work(decodes=decodes, keys=decodes * self.config.max_model_len // 2)
        return self.config.margin * tpot_ms - self.latency.forward_ms(work)

    def _backlog_limit_ms(self, batch: Batch, now_s: float) -> float:
        """When finetuning has to stop so that those who wait for a first token, one after the other and beside the
        decodes, get it in time."""
        scheduled = {id(chunk.sequence): chunk.num_tokens for chunk in batch.prompts}
        limit_ms, backlog_ms = self.config.idle_ms, 0.0
        backlog = list(islice(chain(self._prompts(), self.waiting), BACKLOG))
        stretch = 1 / self._share_of_prompts(batch.decodes) if backlog else 1.0
        for sequence in backlog:
            done = sequence.num_computed_tokens + scheduled.get(id(sequence), 0)
            backlog_ms += stretch * self._prompt_ms(done, sequence.num_tokens)
            limit_ms = min(limit_ms, (sequence.deadline_s - now_s) * 1000 - backlog_ms)
        return self.config.margin * max(0.0, limit_ms)

    def _share_of_prompts(self, decodes: list[Sequence]) -> float:
        """Of the time, where decodes come as often as they have to."""
        if not decodes:
            return 1.0
        tpot_ms = AIM * min(sequence.slo.tpot_ms for sequence in decodes)
        return max(LEAST_SHARE, 1 - self._current.forward_ms(decode_work(decodes)) / tpot_ms)

    def _prompt_ms(self, start: int, end: int) -> float:
        """How long the tokens [start, end) of a sequence take in pieces as large as an iteration takes them."""
        piece = self.config.max_num_batched_tokens
        starts = range(start, end, piece)
        return sum(self._current.forward_ms(chunk_work(a, min(piece, end - a))) for a in starts)

    # --- inference

    def _schedule_decodes(self, batch: Batch, decodes: list[Sequence], limits: Limits, now_s: float) -> None:
        """One token of each; of flexible ones, while they have time, no more than leave the others in time."""
        if len(decodes) > self.config.max_num_batched_tokens:
            decodes = sorted(decodes, key=_deadline)[: self.config.max_num_batched_tokens]
        batch.decodes = decodes
        others_ms = limits.by_rank[FLEX - 1]
        if limits.is_mixed and self._current.forward_ms(batch.inference_work) > others_ms:
            self._hold_back_flexible(batch, others_ms, now_s)
        size = self.blocks.block_size
        full = [s for s in batch.decodes if s.num_computed_tokens % size == 0]
        for sequence in [s for s in full if len(s.block_table) * size < len(s.tokens)]:
            if sequence in self.running:  # else it was preempted for another
                self._grow(batch, sequence, sequence.num_tokens)

    def _hold_back_flexible(self, batch: Batch, limit_ms: float, now_s: float) -> None:
        """All flexible decodes that have time, but for those that fit into the others' limit."""
        urgent = [s for s in batch.decodes if s.slo.rank < FLEX or s.deadline_s <= now_s]
        waiting = (s for s in batch.decodes if s not in urgent)
        flexible = sorted(waiting, key=_deadline)  # so that they take turns
        fitting = largest(
            len(flexible),
            lambda n: self._current.forward_ms(decode_work(urgent + flexible[:n])) <= limit_ms,
        )
        for sequence in flexible[fitting:]:
            batch.drop(sequence)

    def _prompts(self) -> list[Sequence]:
        if not self._has_prompts:
            return []
        return [s for s in self.running if len(s.tokens) - s.num_computed_tokens > 1]

    def _schedule_prompts(self, batch: Batch, limits: Limits) -> None:
        for sequence in sorted(self._prompts(), key=_rank):
            if sequence in self.running:  # else it was preempted for another
                self._schedule_piece(batch, sequence, limits)

    def _schedule_waiting(self, batch: Batch, limits: Limits) -> None:
        """By rank, then first come, first served: nobody overtakes a sequence that does not fit."""
        while self.waiting and self._room(batch) > 0 and self._admit(batch, self.waiting[0]):
            sequence = self.waiting.pop(0)
            self.running.append(sequence)
            self._has_prompts = True
            if not self._schedule_piece(batch, sequence, limits):
                return

    def _room(self, batch: Batch) -> int:
        return self.config.max_num_batched_tokens - batch.num_inference_tokens

    def _schedule_piece(self, batch: Batch, sequence: Sequence, limits: Limits) -> bool:
        """Adds the prompt's next tokens: what fits, but of all prompts together not too little."""
        start = sequence.num_computed_tokens
        most = min(sequence.num_uncomputed_tokens, self._room(batch))
        beside, limit_ms = batch.inference_work, limits.by_rank[sequence.slo.rank]
        fitting = largest(most, lambda n: self._current.forward_ms(beside + chunk_work(start, n)) <= limit_ms)
        least = max(0, self.config.min_prompt_tokens - beside.window_tokens)
        num_tokens = max(fitting, min(most, least))
        if num_tokens <= 0 or not self._grow(batch, sequence, start + num_tokens):
            return False
        batch.prompts.append(Chunk(sequence, start, num_tokens))
        return True

    def _admit(self, batch: Batch, sequence: Sequence) -> bool:
        """Takes what the prefix cache has; False where there is no place, or no memory for the rest."""
        is_full = len(self.running) >= self.config.max_num_seqs
        if is_full and not self._preempt_for(batch, sequence):
            return False
        if sequence.cache_seed is not None and sequence.sampling.prompt_logprobs is None:
            blocks, hashes = self.blocks.match_prefix(sequence.cache_seed, sequence.tokens)
            sequence.block_table, sequence.block_hashes = blocks, hashes
        needed = self.blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        reclaimable = sum(len(job.blocks) for job in self.jobs)
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
            if self._job_blocks.reclaim(self.jobs, batch):
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
