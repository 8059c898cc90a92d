"""Which jobs an iteration computes for beside its requests' tokens, and up to when."""

from __future__ import annotations

import math

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.fair_share import FairShare
from services.gpu_worker.engine.filling import Filling
from services.gpu_worker.engine.interference import Interference
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.finetune.job import FinetuneJob


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
        self.interference: Interference | None = None  # where steps may run beside decodes
        self.can_give_back = True  # steps that an iteration has planned but no time for

    def add(self, job: FinetuneJob) -> None:
        job.served_tokens = min((other.served_tokens for other in self.jobs), default=0.0)
        self.jobs.append(job)

    def remove(self, job: FinetuneJob) -> None:
        self.jobs.remove(job)
        self._blocks.free(job)

    @property
    def is_starved(self) -> bool:
        return self._starved >= self._patience

    def fill(self, batch: Batch, latency: LatencyModel, update_ms: float, forced: bool) -> None:
        """Up to the batch's limit; `forced`: a smallest piece of work at least. `latency` is that of a lane,
        `update_ms` that of an optimizer step, which has no lanes."""
        window = self._window if self.pressure is Pressure.NONE else self._min_window
        forced = forced or self.is_starved
        if batch.decodes and not batch.prompts:
            batch.interference = self.interference
        filling = Filling(
            batch, latency, self._blocks, batch.limit_ms, update_ms, window, self._min_window, forced
        )
        if self.can_give_back:
            filling.step_ms, batch.steps_until_ms = latency.expected_step_ms, batch.limit_ms
        turns = self._by_turn()
        for tenant, jobs in turns.items():
            for job in jobs:
                self._add(filling, tenant, job)
        if turns and not any(job.blocks for job in next(iter(turns.values()))):
            self._shares.end_turn()  # who has no memory must not keep it
        self._starved = 0 if batch.has_finetuning else self._starved + 1

    def give_back(self, batch: Batch, num_steps: int) -> None:
        """All but the first `num_steps` steps of a batch, and what is behind them."""
        late, batch.steps = batch.steps[num_steps:], batch.steps[:num_steps]
        late_jobs = {id(step.job) for step in late}
        batch.updates = [update for update in batch.updates if id(update.job) not in late_jobs]
        batch.reports = [job for job in batch.reports if id(job) not in late_jobs]
        for step in reversed(late):
            job, before = step.job, step.job.served_tokens
            job.take_back(step.sequence, step.window)
            self._shares.charge(_tenant(job), _trained(job, before))

    def fill_with_a_sequence(self, batch: Batch, latency: LatencyModel, update_ms: float) -> None:
        """What is left of one training sequence, and the update behind a step's last one, in one piece."""
        whole = max((job.max_tokens_in_flight for job in self.jobs), default=0)
        grain = whole if batch.num_lanes == 1 else self._min_window
        filling = Filling(batch, latency, self._blocks, math.inf, update_ms, whole, grain, True)
        for tenant, jobs in self._by_turn().items():
            for job in jobs:
                if not batch.has_finetuning:
                    self._add(filling, tenant, job)

    def _add(self, filling: Filling, tenant: str, job: FinetuneJob) -> None:
        before = job.served_tokens
        filling.add(job)
        self._shares.charge(tenant, _trained(job, before))

    def _by_turn(self) -> dict[str, list[FinetuneJob]]:
        jobs: dict[str, list[FinetuneJob]] = {}
        for job in sorted(self.jobs, key=lambda job: job.served_tokens):
            jobs.setdefault(_tenant(job), []).append(job)
        order = self._shares.order({tenant: own[0].weight for tenant, own in jobs.items()})
        return {tenant: jobs[tenant] for tenant in order}


def _trained(job: FinetuneJob, before: float) -> float:
    """Tokens since it had served so many; what has gone half of the way counts half."""
    return (job.served_tokens - before) * job.weight / (2 * job.num_layers)


def _tenant(job: FinetuneJob) -> str:
    return job.tenant or job.job_id
