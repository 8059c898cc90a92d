"""A batch on the device: what the host knows of it from the launch on, and what it reads once it is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from services.gpu_worker.engine.batch import Batch, LaneTiming, Sampled, Timing
from services.gpu_worker.engine.interference import Interference, Overlap
from services.gpu_worker.engine.sampler import Drawn
from services.gpu_worker.finetune.job import FinetuneJob
from services.gpu_worker.finetune.reports import StepReport, TrainingDiverged


class Mark:
    """A moment in what a device computes."""

    def __init__(self, device: torch.device) -> None:
        """After all that the device has been given so far; a CPU has then computed it."""
        self._at_s = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    @property
    def is_past(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def ms_since(self, earlier: Mark) -> float:
        """Both have to be past."""
        if self._event is None or earlier._event is None:
            return (self._at_s - earlier._at_s) * 1000
        elapsed_ms: float = earlier._event.elapsed_time(self._event)
        return elapsed_ms


@dataclass(slots=True)
class LaneMarks:
    """One lane's beginning, the end of its forward, and its end; seconds that its steps waited for the other lane."""

    started: Mark
    forwarded: Mark
    ended: Mark
    waited_s: float = 0.0

    def timing(self) -> LaneTiming:
        steps_ms = self.ended.ms_since(self.forwarded) - self.waited_s * 1000
        return LaneTiming(self.forwarded.ms_since(self.started), steps_ms)


@dataclass(slots=True)
class OverlapMarks:
    """A forward's beginning and end, and those of the steps on the side stream."""

    started: Mark
    forwarded: Mark
    begun: Mark
    ended: Mark
    interference: Interference | None  # None: the steps have waited for the forward

    def timing(self) -> LaneTiming:
        """As they would have taken alone."""
        begun_ms, forward_ms = (mark.ms_since(self.started) for mark in (self.begun, self.forwarded))
        steps_ms = self.ended.ms_since(self.begun)
        if self.interference is None:
            return LaneTiming(forward_ms, steps_ms)
        found = Overlap.begun_at(begun_ms, forward_ms, steps_ms)
        return LaneTiming(*self.interference.alone_ms(found))


@dataclass(slots=True)
class RunResult:
    sampled: list[Sampled] = field(default_factory=list)
    reports: list[tuple[str, StepReport]] = field(default_factory=list)  # (job id, report)
    failures: list[tuple[str, Exception]] = field(default_factory=list)  # (job id, what went wrong)
    timing: Timing = field(default_factory=Timing)


@dataclass(slots=True)
class InFlight:
    """Filled while a batch is launched. A failure in one job's own windows ends up in `failures` and touches nobody
    else."""

    batch: Batch
    started: Mark
    num_steps: int = 0  # that there was time for
    failures: list[tuple[str, Exception]] = field(default_factory=list)  # of the launch
    drawn: Drawn | None = None
    readers: list[Callable[[], None]] = field(default_factory=list)  # of what belongs to sequences
    reports: list[tuple[str, Callable[[], StepReport]]] = field(default_factory=list)
    lanes: list[LaneMarks | OverlapMarks] = field(default_factory=list)
    windows_ended: Mark | None = None
    ended: Mark | None = None

    def guarded(self, job_id: str, work: Callable[[], None]) -> None:
        """Does a job's work unless an earlier part of it has failed."""
        if any(job_id == failed for failed, _ in self.failures):
            return
        try:
            work()
        except (RuntimeError, ValueError, ArithmeticError) as error:
            self.failures.append((job_id, error))

    @property
    def is_done(self) -> bool:
        return self.ended is not None and self.ended.is_past

    def collect(self) -> RunResult:
        """Waits for the device and reads what it has found."""
        assert self.ended is not None
        self.ended.wait()
        result = RunResult(self.drawn.read() if self.drawn else [], failures=self.failures)
        for read in self.readers:
            read()
        for job_id, read_report in self.reports:
            try:
                result.reports.append((job_id, read_report()))
            except TrainingDiverged as error:
                result.failures.append((job_id, error))
        result.timing = self._timing()
        return result

    def _timing(self) -> Timing:
        assert self.windows_ended is not None and self.ended is not None
        lanes = tuple(lane.timing() for lane in self.lanes)
        windows_ms = self.windows_ended.ms_since(self.started)
        forward_ms = lanes[0].forward_ms
        return Timing(forward_ms, windows_ms - forward_ms, self.ended.ms_since(self.windows_ended), lanes)


@dataclass(slots=True)
class Launched:
    """An iteration that is under way; of the jobs that ran then, those that it has brought to their end."""

    batch: Batch
    flight: InFlight | None  # None where there is nothing to compute
    ends_s: float  # as predicted
    jobs: dict[str, FinetuneJob]
    finished: list[FinetuneJob]

    @property
    def is_empty(self) -> bool:
        return self.flight is None and not self.finished
