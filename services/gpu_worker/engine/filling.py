"""How large the windows, steps and updates of jobs are that fill an iteration, and in which lane they are
placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from services.gpu_worker.engine.batch import Batch, JobWindow, Update, window_work
from services.gpu_worker.engine.job_blocks import JobBlocks
from services.gpu_worker.engine.latency import LatencyModel, StepKind, Work, largest
from services.gpu_worker.finetune.job import FinetuneJob, Phase

THROUGH_A_LAYER = StepKind.FORWARD, StepKind.BACKWARD
STEPS = 4  # that should fit into an iteration, at least: larger windows are faster, smaller fill better


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
    ends_ms: list[float] = field(default_factory=list)  # of the batch's steps
    step_ms: Callable[[Work], float] = field(init=False)
    least_ms: float = field(init=False)  # of a smallest step
    forward_ms: float = field(init=False)  # of requests
    steps_ms: float = 0.0  # of the batch's steps, each alone

    def __post_init__(self) -> None:
        self.forward_ms = self.batch.lanes_ms[0]
        self.step_ms = self.latency.step_ms
        smallest = (Work(window_tokens=self.min_window, kind=kind) for kind in THROUGH_A_LAYER)
        self.least_ms = min(map(self.latency.step_ms, smallest))

    def add(self, job: FinetuneJob) -> None:
        if not self._has_time_for(0.5) or (job.parked and not self.blocks.bring_back(job, self.batch)):
            return
        by_layer = not (job.can_pass_all_layers and self._add_window(job))
        if job.phase is Phase.BACKWARD or (job.phase is Phase.FORWARD and by_layer):
            self._add_steps(job)
        if job.phase is Phase.REPORT:
            self.batch.reports.append(job)
        if job.phase is Phase.OPTIMIZER:
            self._add_update(job)

    def _has_time_for(self, part: float) -> bool:
        """Of a smallest step. Mostly there is none, which should not take long to find."""
        return self._is_forced or max(self._left_ms) >= part * self.least_ms

    @property
    def _left_ms(self) -> list[float]:
        """For steps, in each lane."""
        beside, limit_ms = self.batch.interference, self._lanes_limit_ms
        if beside is not None:
            return [beside.room_ms(self.forward_ms, limit_ms) - self.steps_ms]
        return [limit_ms - lane_ms for lane_ms in self.batch.lanes_ms]

    @property
    def _lanes_limit_ms(self) -> float:
        return self.limit_ms - self.batch.updates_ms

    # --- windows through all layers

    def _add_window(self, job: FinetuneJob) -> bool:
        """Where such windows get more done in their time than going layer by layer: they share one reading of the
        weights with requests, but are small where there is little time. False where layer by layer is the way."""
        batch = self.batch
        if batch.num_lanes > 1:
            return False
        if batch.steps and batch.interference:
            return True  # in the next one: before these steps it would make them end later than they were placed for
        sequence, start = job.sequence, job.position
        beside = batch.forward_work
        alone_ms = self.latency.expected_forward_ms(beside)

        def more_ms(size: int) -> float:
            work = window_work(sequence, start, start + size)
            return self.latency.expected_forward_ms(beside + work) - alone_ms

        left_ms = self._lanes_limit_ms - batch.lanes_ms[0]
        size = self._window_size(sequence.num_tokens - start, lambda size: more_ms(size) <= left_ms)
        if not size or more_ms(size) > size * self._token_ms(job):
            return False
        if not self._reserve(job):
            return True
        batch.lanes_ms[0] += more_ms(size)
        batch.interference = None
        window = job.next_window(size)
        job.complete(window)
        batch.forwards.append(JobWindow(job, sequence, window))
        return True

    def _window_size(self, remaining: int, fits: Callable[[int], bool]) -> int:
        """The largest window that fits, in steps of the smallest; all that remains may be smaller or ragged."""
        grain = self.min_window
        most = min(remaining, self.window)
        if most < remaining:
            most -= most % grain
        least = min(most, grain)
        if not fits(least):  # mostly so, and asked first
            return least if self._is_forced else 0
        if least == most or fits(most):
            return most
        return grain * largest(most // grain, lambda n: fits(n * grain))

    def _token_ms(self, job: FinetuneJob) -> float:
        """What a token of the job takes on its way forward layer by layer."""
        width = min(self._grid(job), job.sequence.num_tokens - job.position)
        layer_ms, loss_ms = (
            self.step_ms(Work(window_tokens=width, kind=kind)) for kind in (StepKind.FORWARD, StepKind.LOSS)
        )
        return (job.num_layers * layer_ms + loss_ms) / width

    def _reserve(self, job: FinetuneJob) -> bool:
        return bool(job.reads_cache) or self.blocks.reserve(job)

    # --- steps

    def _add_steps(self, job: FinetuneJob) -> None:
        """Of one training sequence, as many as fit."""
        batch, sequence = self.batch, job.sequence
        if not self._reserve(job):
            return

        @cache  # layer after layer has the same windows
        def cost_ms(start: int, end: int, kind: StepKind) -> float:
            return self.step_ms(window_work(sequence, start, end, kind))

        width, phase = self._grid(job), job.phase

        def place(size: int) -> tuple[JobWindow, float]:
            step = JobWindow(job, sequence, job.next_step(size))
            kind = step.kind
            assert kind is not None
            step.expected_ms = cost_ms(step.window.start, step.window.end, kind)
            return self._place(step)

        while self._has_time_for(1.0):
            placed = self._largest_step(job, width, place)
            if placed is None:
                return
            step, end_ms = placed
            job.complete(step.window)
            batch.steps.append(step)
            batch.lanes_ms[step.lane] = end_ms
            self.steps_ms += step.expected_ms
            self.ends_ms.append(end_ms)
            if job.phase is not phase:
                if job.phase is not Phase.BACKWARD:
                    return
                phase, width = job.phase, self._grid(job)
            elif job.sequence is not sequence:
                return

    def _place(self, step: JobWindow) -> tuple[JobWindow, float]:
        """In the lane where it ends first, and when that is; of two such lanes the busier one."""
        lanes_ms, beside = self.batch.lanes_ms, self.batch.interference
        if beside is not None:
            return step, beside.together_ms(self.forward_ms, self.steps_ms + step.expected_ms)
        if len(lanes_ms) == 1:
            return step, lanes_ms[0] + step.expected_ms
        starts_ms = list(lanes_ms)
        seen = set[int]()
        for earlier, end_ms in zip(reversed(self.batch.steps), reversed(self.ends_ms), strict=True):
            if earlier.lane not in seen and step.must_follow(earlier):
                seen.add(earlier.lane)
                starts_ms[1 - earlier.lane] = max(starts_ms[1 - earlier.lane], end_ms)
                if len(seen) == len(lanes_ms):
                    break
        step.lane = min(range(len(lanes_ms)), key=lambda lane: (starts_ms[lane], -lanes_ms[lane]))
        return step, starts_ms[step.lane] + step.expected_ms

    def _largest_step(
        self, job: FinetuneJob, width: int, place: Callable[[int], tuple[JobWindow, float]]
    ) -> tuple[JobWindow, float] | None:
        """The step that fits up to the next boundary of a grid of this width, or half of it, or a quarter; in the
        backward down to it.

        Layer after layer then has the same few windows, and libraries have ready what they prepare for a size.
        """
        grain, position = self.min_window, job.position
        while True:
            if job.phase is Phase.FORWARD:
                size = width - position % width
            else:
                size = position - (position - 1) // width * width
            step, end_ms = place(size)
            if end_ms <= self._lanes_limit_ms or (width <= grain and self._is_forced):
                return step, end_ms
            if width <= grain:
                return None
            width = -(-width // (2 * grain)) * grain

    def _grid(self, job: FinetuneJob) -> int:
        """The smallest window, doubled as long as several steps of that size fit into what is left; of two lanes
        each should have one in a layer."""
        left_ms, width = sum(self._left_ms), self.min_window
        kind = StepKind.FORWARD if job.phase is Phase.FORWARD else StepKind.BACKWARD
        while 2 * width <= self.window:
            if STEPS * self.step_ms(Work(window_tokens=2 * width, kind=kind)) > left_ms:
                break
            width *= 2
        if self.batch.num_lanes == 1:
            return width
        half = -(-job.sequence.num_tokens // (2 * self.min_window)) * self.min_window
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
