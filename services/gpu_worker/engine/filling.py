"""How large the windows, backward steps and updates of jobs are that fill an iteration, and in which lane they are
placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from services.gpu_worker.engine.batch import Batch, JobWindow, Update, window_work
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, Work, largest
from services.gpu_worker.finetune.job import FinetuneJob, Phase

STEPS = 4  # of a backward that should fit into an iteration, at least: larger windows are faster, smaller fill better


@dataclass(slots=True)
class Filling:
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
        if not self._has_time_for(0.5) or (job.parked and not self.blocks.bring_back(job, self.batch)):
            return 0.0
        before = job.served_tokens
        if job.phase is Phase.FORWARD:
            self._add_forward(job)
        if job.phase is Phase.BACKWARD:
            self._add_backwards(job)
        if job.phase is Phase.OPTIMIZER:
            self._add_update(job)
        return (job.served_tokens - before) * job.weight / (2 * job.num_layers)

    def _has_time_for(self, part: float) -> bool:
        """Of a smallest step. Mostly there is none, which should not take long to find."""
        return self._is_forced or max(self._left_ms) >= part * self.least_ms

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
        least = min(most, grain)
        if not fits(least):  # mostly so, and asked first
            return least if self._is_forced else 0
        if least == most or fits(most):
            return most
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

        while job.phase is Phase.BACKWARD and self._has_time_for(1.0):
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
