"""Which windows, backward steps and updates of which jobs an iteration computes beside its requests' tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from services.gpu_worker.engine.batch import Batch, JobWindow, Update, window_work
from services.gpu_worker.engine.fair_share import FairShare
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, largest
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.finetune.job import FinetuneJob, Phase

GRAIN = 8  # tokens: windows are cut no finer


class FinetuneScheduler:
    """Tenants take turns; of a tenant's jobs the least served is first.

    `window` is the largest, in tokens; pieces below `min_window` cost more than they bring. After `patience`
    iterations without finetuning a smallest piece is computed whatever the limit.
    """

    def __init__(self, blocks: JobBlocks, window: int, min_window: int, patience: int) -> None:
        self.jobs: list[FinetuneJob] = []
        self.pressure = Pressure.NONE
        self._blocks = blocks
        self._window, self._min_window, self._patience = window, min_window, patience
        self._shares = FairShare(quantum=window)
        self._starved = 0  # iterations in a row in which jobs got nothing

    def add(self, job: FinetuneJob) -> None:
        job.served_tokens = min((other.served_tokens for other in self.jobs), default=0.0)
        self.jobs.append(job)

    def remove(self, job: FinetuneJob) -> None:
        self.jobs.remove(job)
        self._blocks.free(job)

    @property
    def is_starved(self) -> bool:
        return self._starved >= self._patience

    def fill(self, batch: Batch, latency: LatencyModel, forced: bool) -> None:
        """Up to the batch's limit; `forced`: a smallest piece of work at least."""
        window = self._window if self.pressure is Pressure.NONE else self._min_window
        forced = forced or self.is_starved
        filling = _Filling(batch, latency, self._blocks, batch.limit_ms, window, self._min_window, forced)
        turns = self._by_turn()
        for tenant, jobs in turns.items():
            self._shares.charge(tenant, sum(map(filling.add, jobs)))
        if turns and not any(job.blocks for job in next(iter(turns.values()))):
            self._shares.end_turn()  # who has no memory must not keep it
        self._starved = 0 if batch.has_finetuning else self._starved + 1

    def fill_with_a_sequence(self, batch: Batch, latency: LatencyModel) -> None:
        """What is left of one training sequence, and the update behind a step's last one, in one piece."""
        filling = _Filling(batch, latency, self._blocks, math.inf, self._longest, self._min_window, True)
        for tenant, jobs in self._by_turn().items():
            for job in jobs:
                if not batch.has_finetuning:
                    self._shares.charge(tenant, filling.add(job))

    @property
    def _longest(self) -> int:
        return max((job.max_tokens_in_flight for job in self.jobs), default=0)

    def _by_turn(self) -> dict[str, list[FinetuneJob]]:
        jobs: dict[str, list[FinetuneJob]] = {}
        for job in sorted(self.jobs, key=lambda job: job.served_tokens):
            jobs.setdefault(job.tenant or job.job_id, []).append(job)
        order = self._shares.order({tenant: own[0].weight for tenant, own in jobs.items()})
        return {tenant: jobs[tenant] for tenant in order}


@dataclass(slots=True)
class _Filling:
    """Adds jobs' work to a batch as long as its predicted time is within `limit_ms`."""

    batch: Batch
    latency: LatencyModel
    blocks: JobBlocks
    limit_ms: float
    window: int
    min_window: int
    forced: bool

    def add(self, job: FinetuneJob) -> float:
        """Returns tokens; those that only went forward, or only backward through some layers, count in part."""
        if job.parked and not self.blocks.bring_back(job, self.batch):
            return 0.0
        before = job.served_tokens
        if job.phase is Phase.FORWARD:
            self._add_forward(job)
        if job.phase is Phase.BACKWARD:
            self._add_backwards(job)
        if job.phase is Phase.OPTIMIZER:
            self._add_update(job)
        return (job.served_tokens - before) * job.weight / (2 * job.num_layers)

    def _add_forward(self, job: FinetuneJob) -> None:
        if job.position == 0 and not self.blocks.reserve(job):
            return
        batch, latency, sequence, start = self.batch, self.latency, job.sequence, job.position
        beside, evaluating = batch.forward_work, job.evaluating
        others_ms = batch.predicted_ms - latency.forward_ms(beside)
        left_ms = self.limit_ms - others_ms

        def fits(size: int) -> bool:
            return latency.forward_ms(beside + window_work(sequence, start, start + size)) <= left_ms

        size = self._size(job.remaining_forward, self.forced and not batch.has_finetuning, fits)
        if size:
            window = job.next_forward(size)
            job.complete(window)
            batch.forwards.append(JobWindow(job, sequence, window, evaluating and not job.evaluating))
            batch.predicted_ms = others_ms + latency.forward_ms(batch.forward_work)

    def _add_backwards(self, job: FinetuneJob) -> None:
        batch, latency, sequence = self.batch, self.latency, job.sequence

        @cache  # layer after layer has the same windows
        def cost_ms(start: int, end: int) -> float:
            return latency.backward_ms(window_work(sequence, start, end))

        while job.phase is Phase.BACKWARD:
            left_ms, end = self.limit_ms - batch.predicted_ms, job.position

            def fits(size: int, left_ms: float = left_ms, end: int = end) -> bool:
                return cost_ms(end - size, end) <= left_ms

            size = self._size(end, self.forced and not batch.has_finetuning, fits)
            if not size:
                return
            window = job.next_backward(size)
            job.complete(window)
            batch.backwards.append(JobWindow(job, sequence, window))
            batch.predicted_ms += cost_ms(window.start, window.end)

    def _add_update(self, job: FinetuneJob) -> None:
        """As many parts of the optimizer step as fit."""
        batch, start = self.batch, job.updated_parts
        part_ms = self.latency.optimizer_ms / job.num_update_parts
        left_ms = self.limit_ms - batch.predicted_ms
        end = start + largest(job.num_update_parts - start, lambda n: n * part_ms <= left_ms)
        if end == start and self.forced and not batch.has_finetuning:
            end += 1
        if end > start:
            batch.updates.append(Update(job, start, end))
            batch.predicted_ms += (end - start) * part_ms

    def _size(self, remaining: int, forced: bool, fits: Callable[[int], bool]) -> int:
        """The largest window of `remaining` tokens that fits; no crumbs, unless they are all that is left."""
        most = min(remaining, self.window)
        least = min(self.min_window, most)
        if fits(most):
            return most
        if not fits(least):
            return least if forced else 0
        return least + GRAIN * largest((most - least) // GRAIN, lambda n: fits(least + n * GRAIN))
