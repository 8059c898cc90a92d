"""Which windows, backward steps and updates of which jobs an iteration computes beside its requests' tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from services.gpu_worker.engine.batch import Batch, JobWindow, Update, window_work
from services.gpu_worker.engine.fair_share import FairShare
from services.gpu_worker.engine.interference import Interference
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
        self.interference: Interference | None = None  # where a backward may run beside decodes
        self.can_give_back = True  # steps that an iteration has planned but no time for

    def add(self, job: FinetuneJob) -> None:
        job.served_tokens = min((other.served_tokens for other in self.jobs), default=0.0)
        self.jobs.append(job)

    def remove(self, job: FinetuneJob) -> None:
        self.jobs.remove(job)
        self._blocks.free(job)

    @property
    def first_in_turn(self) -> FinetuneJob:
        """Of the jobs, of which there must be one, the first that the next `fill` asks."""
        return next(iter(self._by_turn().values()))[0]

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
        filling = _Filling(
            batch, latency, self._blocks, batch.limit_ms, update_ms, window, self._min_window, forced
        )
        if self.can_give_back:
            filling.step_ms, batch.steps_until_ms = latency.expected_backward_ms, batch.limit_ms
        turns = self._by_turn()
        for tenant, jobs in turns.items():
            self._shares.charge(tenant, sum(map(filling.add, jobs)))
        if turns and not any(job.blocks for job in next(iter(turns.values()))):
            self._shares.end_turn()  # who has no memory must not keep it
        self._starved = 0 if batch.has_finetuning else self._starved + 1

    def give_back(self, batch: Batch, num_steps: int) -> None:
        """All but the first `num_steps` steps of a batch's backward, and the updates behind them."""
        late, batch.backwards = batch.backwards[num_steps:], batch.backwards[:num_steps]
        batch.updates = [u for u in batch.updates if all(step.job is not u.job for step in late)]
        for step in reversed(late):
            step.job.take_back(step.sequence, step.window)
            self._shares.charge(_tenant(step.job), -step.num_tokens / (2 * step.job.num_layers))

    def fill_with_a_sequence(self, batch: Batch, latency: LatencyModel, update_ms: float) -> None:
        """What is left of one training sequence, and the update behind a step's last one, in one piece."""
        whole = max((job.max_tokens_in_flight for job in self.jobs), default=0)
        grain = whole if batch.num_lanes == 1 else self._min_window
        filling = _Filling(batch, latency, self._blocks, math.inf, update_ms, whole, grain, True)
        for tenant, jobs in self._by_turn().items():
            for job in jobs:
                if not batch.has_finetuning:
                    self._shares.charge(tenant, filling.add(job))

    def _by_turn(self) -> dict[str, list[FinetuneJob]]:
        jobs: dict[str, list[FinetuneJob]] = {}
        for job in sorted(self.jobs, key=lambda job: job.served_tokens):
            jobs.setdefault(_tenant(job), []).append(job)
        order = self._shares.order({tenant: own[0].weight for tenant, own in jobs.items()})
        return {tenant: jobs[tenant] for tenant in order}


def _tenant(job: FinetuneJob) -> str:
    return job.tenant or job.job_id


@dataclass(slots=True)
class _Filling:
    """Adds jobs' work to a batch's lanes as long as each of them is predicted to end within `limit_ms`."""

    batch: Batch
    latency: LatencyModel
    blocks: JobBlocks
    limit_ms: float
    update_ms: float
    window: int  # largest
    min_window: int
    forced: bool
    ends_ms: list[float] = field(default_factory=list)  # of the batch's steps of the backward
    step_ms: Callable[[Work], float] = field(init=False)  # of the backward
    least_ms: float = field(init=False)  # of a smallest step
    forward_ms: float = field(init=False)  # of requests
    backward_ms: float = 0.0  # of the batch's steps, each alone

    def __post_init__(self) -> None:
        self.forward_ms = self.batch.lanes_ms[0]
        self.step_ms = self.latency.backward_ms
        self.least_ms = self.latency.backward_ms(Work(window_tokens=self.min_window))

    def add(self, job: FinetuneJob) -> float:
        """Returns tokens; those that only went forward, or only backward through some layers, count in part."""
        if self._is_full or (job.parked and not self.blocks.bring_back(job, self.batch)):
            return 0.0
        before = job.served_tokens
        if job.phase is Phase.FORWARD:
            self._add_forward(job)
        if job.phase is Phase.BACKWARD:
            self._add_backwards(job)
        if job.phase is Phase.OPTIMIZER:
            self._add_update(job)
        return (job.served_tokens - before) * job.weight / (2 * job.num_layers)

    @property
    def _is_full(self) -> bool:
        """There is no time for half of a smallest step. Most jobs find it so, and should not take long to."""
        if self._is_forced:
            return False
        return max(self._left_ms) < self.least_ms / 2

    @property
    def _left_ms(self) -> list[float]:
        """For the backward, in each lane."""
        beside, limit_ms = self.batch.interference, self._lanes_limit_ms
        if beside is not None:
            return [beside.room_ms(self.forward_ms, limit_ms) - self.backward_ms]
        return [limit_ms - lane_ms for lane_ms in self.batch.lanes_ms]

    @property
    def _lanes_limit_ms(self) -> float:
        return self.limit_ms - self.batch.updates_ms

    # --- forward

    def _add_forward(self, job: FinetuneJob) -> None:
        if self.batch.backwards and (self.batch.num_lanes > 1 or self.batch.interference):
            return  # it would run before them, and they would end later than they were placed for
        if job.position == 0 and not self.blocks.reserve(job):
            return
        sequence, evaluating, start = job.sequence, job.evaluating, job.position
        beside = [self.batch.forward_work(lane) for lane in range(self.batch.num_lanes)]
        alone_ms = [self.latency.expected_forward_ms(work) for work in beside]

        def end_ms(lane: int, start: int, size: int) -> float:
            if not size:
                return 0.0
            fused_ms = self.latency.expected_forward_ms(
                beside[lane] + window_work(sequence, start, start + size)
            )
            return self.batch.lanes_ms[lane] - alone_ms[lane] + fused_ms

        def fits(size: int) -> bool:
            first, second = self._share(size)
            in_time = end_ms(-1, start, first) <= self._lanes_limit_ms
            return in_time and end_ms(0, start + first, second) <= self._lanes_limit_ms

        size = self._forward_size(job.remaining_forward, fits)
        for lane, part in zip((self.batch.num_lanes - 1, 0), self._share(size), strict=True):
            if part:
                self.batch.lanes_ms[lane] = end_ms(lane, job.position, part)
                self.batch.interference = None
                window = job.next_forward(part)
                job.complete(window)
                ends = evaluating and not job.evaluating
                self.batch.forwards.append(JobWindow(job, sequence, window, ends, lane))

    def _share(self, size: int) -> tuple[int, int]:
        """Of a window's tokens those of the last lane, which are the first ones, and those of the other lane: so many
        that both lanes end at about the same time, and neither's are too few."""
        if self.batch.num_lanes == 1 or size < 2 * self.min_window:
            return size, 0
        ahead_ms = self.batch.lanes_ms[0] - self.batch.lanes_ms[1]
        token_ms = self.latency.expected_forward_ms(Work(window_tokens=size, loss_tokens=size)) / size
        first = round((size + ahead_ms / token_ms) / 2 / self.min_window) * self.min_window
        if first > size - self.min_window:
            return size, 0
        first = max(self.min_window, first)
        return first, size - first

    def _forward_size(self, remaining: int, fits: Callable[[int], bool]) -> int:
        """The largest window that fits, in steps of the smallest; all that remains may be smaller or ragged."""
        grain = self.min_window
        most = min(remaining, self.window * self.batch.num_lanes)
        if most < remaining:
            most -= most % grain
        if fits(most):
            return most
        if most <= grain or not fits(grain):
            return min(most, grain) if self._is_forced else 0
        return grain * largest(most // grain, lambda n: fits(n * grain))

    # --- backward

    def _add_backwards(self, job: FinetuneJob) -> None:
        batch, sequence = self.batch, job.sequence

        @cache  # layer after layer has the same windows
        def cost_ms(start: int, end: int, is_first: bool) -> float:
            return self.step_ms(window_work(sequence, start, end, is_first))

        forwarded_ms = self._forwarded_ms(job)
        width = self._grid(sequence.num_tokens)

        def place(size: int) -> tuple[JobWindow, float]:
            window = job.next_backward(size)
            step_ms = cost_ms(window.start, window.end, window.layer == job.num_layers - 1)
            return self._place(JobWindow(job, sequence, window, expected_ms=step_ms), forwarded_ms)

        while job.phase is Phase.BACKWARD:
            placed = self._largest_step(job.position, width, place)
            if placed is None:
                return
            step, end_ms = placed
            job.complete(step.window)
            batch.backwards.append(step)
            batch.lanes_ms[step.lane] = end_ms
            self.backward_ms += step.expected_ms
            self.ends_ms.append(end_ms)

    def _forwarded_ms(self, job: FinetuneJob) -> float:
        """When the windows that the batch has of this job will have gone forward, in all lanes."""
        own = {work.lane for work in self.batch.forwards if work.job is job}
        return max(
            (self.latency.expected_forward_ms(self.batch.forward_work(lane)) for lane in own), default=0.0
        )

    def _place(self, step: JobWindow, earliest_ms: float) -> tuple[JobWindow, float]:
        """In the lane where it ends first, and when that is; of two such lanes the busier one."""
        lanes_ms, beside = self.batch.lanes_ms, self.batch.interference
        if beside is not None:
            return step, beside.together_ms(self.forward_ms, self.backward_ms + step.expected_ms)
        if len(lanes_ms) == 1:
            return step, lanes_ms[0] + step.expected_ms
        starts_ms = [max(busy_ms, earliest_ms) for busy_ms in lanes_ms]
        seen = set[int]()
        for earlier, end_ms in zip(reversed(self.batch.backwards), reversed(self.ends_ms), strict=True):
            if earlier.lane not in seen and step.must_follow(earlier):
                seen.add(earlier.lane)
                starts_ms[1 - earlier.lane] = max(starts_ms[1 - earlier.lane], end_ms)
                if len(seen) == len(lanes_ms):
                    break
        step.lane = min(range(len(lanes_ms)), key=lambda lane: (starts_ms[lane], -lanes_ms[lane]))
        return step, starts_ms[step.lane] + step.expected_ms

    def _largest_step(
        self, end: int, width: int, place: Callable[[int], tuple[JobWindow, float]]
    ) -> tuple[JobWindow, float] | None:
        """The step that fits down to the next boundary of a grid of this width, or half of it, or a quarter.

        Layer after layer then has the same few windows, and libraries have ready what they prepare for a size.
        """
        grain = self.min_window
        while True:
            step, end_ms = place(end - (end - 1) // width * width)
            if end_ms <= self._lanes_limit_ms or (width <= grain and self._is_forced):
                return step, end_ms
            if width <= grain:
                return None
            width = -(-width // (2 * grain)) * grain

    def _grid(self, num_tokens: int) -> int:
        """The smallest window, doubled as long as several steps of that size fit into what is left; of two lanes
        each should have one in a layer."""
        left_ms = sum(self._left_ms)
        width = self.min_window
        while 2 * width <= self.window:
            if STEPS * self.step_ms(Work(window_tokens=2 * width)) > left_ms:
                break
            width *= 2
        if self.batch.num_lanes == 1:
            return width
        half = -(-num_tokens // (2 * self.min_window)) * self.min_window
        return min(width, half)

    # --- update

    def _add_update(self, job: FinetuneJob) -> None:
        """As many parts of the optimizer step as fit."""
        batch, start = self.batch, job.updated_parts
        part_ms = self.update_ms / job.num_update_parts
        left_ms = self.limit_ms - batch.predicted_ms
        end = start + largest(job.num_update_parts - start, lambda n: n * part_ms <= left_ms)
        if end == start and self._is_forced:
            end += 1
        if end > start:
            batch.updates.append(Update(job, start, end))
            batch.updates_ms += (end - start) * part_ms

    @property
    def _is_forced(self) -> bool:
        return self.forced and not self.batch.has_finetuning
