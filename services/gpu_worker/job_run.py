"""One job in a worker's hands: what is under way for it, and what its next beat and its end tell the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from services.gpu_worker.finetune.job import FinetuneJob
from services.gpu_worker.finetune.reports import StepReport
from shared.messages import BeatReply, BeatRequest, EndJob, JobLease, JobMessage, StepMetrics


@dataclass(slots=True, eq=False)
class JobRun:
    lease: JobLease
    confirmed_s: float  # monotonic time of the last good beat
    started_s: float
    first_step: int
    metrics: list[StepMetrics] = field(default_factory=list)
    messages: list[JobMessage] = field(default_factory=list)
    last_step_s: float = 0.0
    last_valid: StepReport | None = None
    first_valid: StepReport | None = None
    last_train: StepReport | None = None
    trained_at: float | None = None  # unix time of the last optimizer step, for people
    saved_step: int = 0
    saved_s: float = 0.0
    beat_s: float = 0.0
    beating: Future[BeatReply] | None = None
    saving: Future[None] | None = None
    ending: Future[Any] | None = None  # publish, or end: nothing else is sent any more
    on_ended: Callable[[Any], None] | None = None

    def say(self, message: str) -> None:
        self.messages.append(JobMessage(message=message))

    def add_report(self, report: StepReport, now: float) -> None:
        """For the next beat; `now` is monotonic."""
        speed = None
        if report.train_loss is not None:
            self.last_train, self.trained_at = report, time.time()
            speed = report.num_tokens / max(now - self.last_step_s, 1e-9)
            self.last_step_s = now
            if report.grad_norm is None:
                self.say(f"Step {report.step} skipped: the gradient was not finite")
        else:
            self.last_valid, self.first_valid = report, self.first_valid or report
        self.metrics.append(step_metrics(report, speed))

    def beat_request(self, job: FinetuneJob, trained_tokens: int, now: float) -> BeatRequest:
        """All that has been said and measured since `sent_beat`."""
        done = job.step - self.first_step
        remaining = job.total_steps - job.step
        return BeatRequest(
            fence=self.lease.fence,
            step=job.step,
            total_steps=job.total_steps,
            trained_tokens=trained_tokens,
            eta_s=(now - self.started_s) / done * remaining if done else None,
            metrics=tuple(self.metrics),
            messages=tuple(self.messages),
        )

    def sent_beat(self, beating: Future[BeatReply], now: float) -> None:
        self.beating, self.beat_s = beating, now
        self.metrics, self.messages = [], []

    def final_metrics(self) -> dict[str, float]:
        """What a version says of its training."""
        train, valid, first = self.last_train, self.last_valid, self.first_valid
        found = {
            "train_loss": train.train_loss if train else None,
            "train_mean_token_accuracy": train.train_accuracy if train else None,
            "valid_loss": valid.valid_loss if valid else None,
            "valid_mean_token_accuracy": valid.valid_accuracy if valid else None,
            "base_valid_loss": first.valid_loss if first and first.step == 0 else None,
            "trained_at": self.trained_at,
        }
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def step_metrics(report: StepReport, tokens_per_s: float | None) -> StepMetrics:
    """JSON has no NaN: a loss that is not finite is left out."""
    return StepMetrics(
        step=report.step,
        train_loss=_finite(report.train_loss),
        train_mean_token_accuracy=_finite(report.train_accuracy),
        valid_loss=_finite(report.valid_loss),
        valid_mean_token_accuracy=_finite(report.valid_accuracy),
        learning_rate=report.learning_rate,
        grad_norm=_finite(report.grad_norm),
        num_tokens=report.num_tokens,
        tokens_per_s=tokens_per_s,
    )


def failure_of(lease: JobLease, code: str, message: str) -> EndJob:
    return EndJob(fence=lease.fence, outcome="failed", code=code, message=message[:2000])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
