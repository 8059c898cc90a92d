"""Which windows, backward steps and updates of which jobs an iteration computes beside its requests' tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from services.gpu_worker.engine.batch import Batch, JobWindow, Update, window_work
from services.gpu_worker.engine.fair_share import FairShare
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, Work, largest
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.finetune.job import FinetuneJob, Phase

STEPS = 4  # of a backward that should fit into an iteration, at least: larger windows are faster, smaller fill better


class FinetuneScheduler:
    """Tenants take turns; of a tenant's jobs the least served is first.

    `window` is the largest, in tokens; pieces below `min_window` cost more than they bring. After `patience`
    iterations without finetuning a smallest piece is computed whatever the limit.
    """

    def __init__(self, blocks: JobBlocks, window: int, min_window: int, patience: int) -> None:
        self.jobs: list[FinetuneJob] = []
        self.pressure = Pressure.NONE
        self._blocks = blocks
        self._window, self._min_window, self._patience = window, min(min_window, window), patience
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
        whole = max((job.max_tokens_in_flight for job in self.jobs), default=0)
        filling = _Filling(batch, latency, self._blocks, math.inf, whole, whole, True)
        for tenant, jobs in self._by_turn().items():
            for job in jobs:
                if not batch.has_finetuning:
                    self._shares.charge(tenant, filling.add(job))

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
    window: int  # largest
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

        size = self._forward_size(job.remaining_forward, fits)
        if size:
            window = job.next_forward(size)
            job.complete(window)
            batch.forwards.append(JobWindow(job, sequence, window, evaluating and not job.evaluating))
            batch.predicted_ms = others_ms + latency.forward_ms(batch.forward_work)

    def _add_backwards(self, job: FinetuneJob) -> None:
        batch, latency, sequence = self.batch, self.latency, job.sequence

        @cache  # layer after layer has the same windows
        def cost_ms(start: int, end: int, is_first: bool) -> float:
            return latency.backward_ms(replace(window_work(sequence, start, end), is_first=is_first))

        width = self._grid()
        while job.phase is Phase.BACKWARD:
            left_ms, end = self.limit_ms - batch.predicted_ms, job.position
            is_first = job.layer == job.num_layers - 1

            def fits(size: int, left_ms: float = left_ms, end: int = end, is_first: bool = is_first) -> bool:
                return cost_ms(end - size, end, is_first) <= left_ms

            size = self._backward_size(end, width, fits)
            if not size:
                return
            window = job.next_backward(size)
            job.complete(window)
            batch.backwards.append(JobWindow(job, sequence, window))
            batch.predicted_ms += cost_ms(window.start, window.end, is_first)

    def _add_update(self, job: FinetuneJob) -> None:
        """As many parts of the optimizer step as fit."""
        batch, start = self.batch, job.updated_parts
        part_ms = self.latency.optimizer_ms / job.num_update_parts
        left_ms = self.limit_ms - batch.predicted_ms
        end = start + largest(job.num_update_parts - start, lambda n: n * part_ms <= left_ms)
        if end == start and self._is_forced:
            end += 1
        if end > start:
            batch.updates.append(Update(job, start, end))
            batch.predicted_ms += (end - start) * part_ms

    def _forward_size(self, remaining: int, fits: Callable[[int], bool]) -> int:
        """The largest window that fits, in steps of the smallest; all that remains may be smaller or ragged."""
        grain = self.min_window
        most = min(remaining, self.window)
        if most < remaining:
            most -= most % grain
        if fits(most):
            return most
        if most <= grain or not fits(grain):
            return min(most, grain) if self._is_forced else 0
        return grain * largest(most // grain, lambda n: fits(n * grain))

    def _backward_size(self, end: int, width: int, fits: Callable[[int], bool]) -> int:
        """Down to the next boundary of a grid of this width, or half of it, or a quarter.

        Layer after layer then has the same few windows, and libraries have ready what they prepare for a size.
        """
        while width >= self.min_window:
            size = end - (end - 1) // width * width
            if fits(size) or (width // 2 < self.min_window and self._is_forced):
                return size
            width //= 2
        return 0

    def _grid(self) -> int:
        """The smallest window, doubled as long as several steps of that size fit into what is left."""
        left_ms, width = self.limit_ms - self.batch.predicted_ms, self.min_window
        while 2 * width <= self.window:
            if STEPS * self.latency.backward_ms(Work(window_tokens=2 * width)) > left_ms:
                break
            width *= 2
        return width

    @property
    def _is_forced(self) -> bool:
        return self.forced and not self.batch.has_finetuning
