"""What a job's optimizer steps and evaluations come to, read when the device has come to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from services.gpu_worker.finetune.loss import Means
from services.gpu_worker.finetune.optimizer import GradientNorm

MAX_SKIPPED_STEPS = 3  # non-finite gradients in a row before a job is given up


class TrainingDiverged(RuntimeError):
    """Several optimizer steps in a row had gradients that were not finite."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, or an evaluation after it."""

    step: int
    learning_rate: float | None = None
    grad_norm: float | None = None  # None: not finite, the step was skipped
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Step:
    """An optimizer step that has been launched; `report` lacks what the device has to tell."""

    report: StepReport
    norm: GradientNorm
    means: Means
    num_skipped: int | None = None  # in a row up to this one, once its norm is known


class LaunchedSteps:
    """Counts the steps that have moved nothing because their gradients were not finite."""

    def __init__(self) -> None:
        self._num_skipped = 0
        self._unread: deque[_Step] = deque()

    def add(self, report: StepReport, norm: GradientNorm, means: Means) -> Callable[[], StepReport]:
        """Gives what waits for the step and reads its report, which raises TrainingDiverged after several steps in a
        row that were skipped."""
        step = _Step(report, norm, means)
        self._unread.append(step)
        return partial(self._read, step)

    @property
    def num_skipped(self) -> int:
        """In a row, up to the last step; waits for it."""
        while self._unread:
            self._count(self._unread.popleft())
        return self._num_skipped

    @num_skipped.setter
    def num_skipped(self, count: int) -> None:
        self._num_skipped = count

    def _read(self, step: _Step) -> StepReport:
        while step.num_skipped is None:  # later steps may be under way
            self._count(self._unread.popleft())
        if step.num_skipped >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"the gradient was not finite in {step.num_skipped} steps in a row, up to step {step.report.step}"
            )
        loss, accuracy = step.means.read()
        return replace(step.report, grad_norm=step.norm.read(), train_loss=loss, train_accuracy=accuracy)

    def _count(self, step: _Step) -> None:
        self._num_skipped = 0 if step.norm.read() is not None else self._num_skipped + 1
        step.num_skipped = self._num_skipped


def read_evaluation(step: int, means: Means) -> StepReport:
    """Means over the validation set after `step` optimizer steps."""
    loss, accuracy = means.read()
    return StepReport(step, valid_loss=loss, valid_accuracy=accuracy)
