"""How requests and jobs share the iterations: co-serving, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, Protocol

SharingName = Literal["coserve", "inference-only", "finetune-only", "temporal", "temporal-dynamic"]
LONGEST_PERIOD = 512  # iterations


class Turn(Enum):
    """What an iteration is for."""

    BOTH = auto()
    INFERENCE = auto()
    FINETUNING = auto()  # one training sequence from its first window to its last, whatever the limit


class Sharing(Protocol):
    def turn(self, has_requests: bool, has_jobs: bool, is_late: bool) -> Turn:
        """Called once an iteration; `is_late`: somebody's next token is overdue."""
        ...


@dataclass(frozen=True, slots=True)
class Always:
    what: Turn

    def turn(self, has_requests: bool, has_jobs: bool, is_late: bool) -> Turn:
        return self.what


@dataclass(slots=True)
class Temporal:
    """After `period` iterations of inference one of finetuning, which takes as long as a training sequence does;
    without requests finetuning alone."""

    period: int
    _since: int = 0

    def turn(self, has_requests: bool, has_jobs: bool, is_late: bool) -> Turn:
        if has_requests and (self._since < self.period or not has_jobs):
            self._since += 1
            return Turn.INFERENCE
        self._since = 0
        return Turn.FINETUNING


@dataclass(slots=True)
class DynamicTemporal:
    """Temporal sharing whose period follows the load: longer by half after a period in which somebody was late,
    else shorter by an eighth."""

    period: int
    _since: int = 0
    _was_late: bool = False

    def turn(self, has_requests: bool, has_jobs: bool, is_late: bool) -> Turn:
        self._was_late = self._was_late or is_late
        if has_requests and (self._since < self.period or not has_jobs):
            self._since += 1
            return Turn.INFERENCE
        if self._since:
            longer = min(LONGEST_PERIOD, self.period + -(-self.period // 2))
            self.period = longer if self._was_late else max(1, self.period - -(-self.period // 8))
        self._since, self._was_late = 0, False
        return Turn.FINETUNING


def make_sharing(name: SharingName, period: int) -> Sharing:
    match name:
        case "coserve":
            return Always(Turn.BOTH)
        case "inference-only":
            return Always(Turn.INFERENCE)
        case "finetune-only":
            return Always(Turn.FINETUNING)
        case "temporal":
            return Temporal(period)
        case "temporal-dynamic":
            return DynamicTemporal(period)
