"""How far predictions are off: what corrects them while serving, and what is reported of them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

RECENT = 11  # iterations that the level is taken from: half as many until a machine's new speed is believed
KEPT = slice(3, 8)  # of them in order: up to three disturbances among them change nothing
RESIDUALS = 128  # iterations that the margin is taken from
EXCEEDED = 0.045  # share of iterations that take longer than planned: 5 % with those after a change
STEP = 0.005  # by which one iteration moves the share of residuals that the margin leaves out
MOST = 8.0  # what slows a machine down by more is no rule
MOST_MARGIN = 3.0  # what jitters by more cannot be planned for
FORGET_EVERY = 10  # iterations without such work, for each ratio
HISTORY = 512  # predictions that errors are reported of


@dataclass(frozen=True, slots=True)
class Errors:
    """Of the last predictions: quantiles of |actual / expected - 1|, and the share that took longer than planned
    (the expectation with its margin)."""

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    exceeded: float = 0.0
    margin: float = 1.0  # planned over expected, on average


@dataclass(slots=True)
class Accuracy:
    """The last predictions of one kind beside what was measured."""

    _records: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def add(self, expected_ms: float, planned_ms: float, actual_ms: float) -> None:
        if expected_ms > 0 and actual_ms > 0:
            self._records.append((expected_ms, planned_ms, actual_ms))

    def errors(self) -> Errors:
        count = len(self._records)
        if not count:
            return Errors()
        off = sorted(abs(actual / expected - 1) for expected, _, actual in self._records)
        return Errors(
            count,
            off[(count - 1) // 2],
            off[math.ceil(0.95 * count) - 1],
            sum(actual > planned for _, planned, actual in self._records) / count,
            sum(planned / expected for expected, planned, _ in self._records) / count,
        )


@dataclass(slots=True)
class Correction:
    """What one kind of work takes over what the table says: the level of the last iterations, and the margin above
    it that all but a few of them keep within.

    The level is a trimmed mean, so that a disturbance does not move it and a change of speed does within six to
    eight iterations. Residuals are taken against the median around an iteration, not the level before it: a change
    of speed then leaves no trace in the margin. How many of them it leaves out follows from how many iterations took
    longer than planned (adaptive conformal inference: Gibbs and Candes, arXiv 2106.00170), so that their share
    holds for noise of any kind.
    """

    accuracy: Accuracy = field(default_factory=Accuracy)
    level: float = 1.0
    margin: float = 1.0
    _ratios: deque[float] = field(default_factory=lambda: deque([1.0] * RECENT, maxlen=RECENT))
    _residuals: deque[float] = field(default_factory=lambda: deque(maxlen=RESIDUALS))
    _left_out: float = EXCEEDED
    _unobserved: int = 0

    @property
    def factor(self) -> float:
        return self.level * self.margin

    def observe(self, table_ms: float, actual_ms: float) -> None:
        """Without anything to observe (0) the past is slowly forgotten: else a ratio that keeps work from being
        scheduled would never be put right."""
        if table_ms <= 0 or actual_ms <= 0:
            self._unobserved += 1
            if self._unobserved % FORGET_EVERY == 0:
                self._ratios.append(1.0)
                self.level = self._center()
            return
        self._unobserved = 0
        self.accuracy.add(table_ms * self.level, table_ms * self.factor, actual_ms)
        exceeded = actual_ms > table_ms * self.factor
        self._left_out = min(2 * EXCEEDED, max(0.0, self._left_out + STEP * (EXCEEDED - exceeded)))
        self._ratios.append(min(MOST, max(1 / MOST, actual_ms / table_ms)))
        self.level = self._center()
        self._residuals.append(self._ratios[RECENT // 2] / sorted(self._ratios)[RECENT // 2])
        self.margin = self._quantile()

    def _center(self) -> float:
        kept = sorted(self._ratios)[KEPT]
        return sum(kept) / len(kept)

    def _quantile(self) -> float:
        """Of the residuals, without the one largest: a single disturbance is no reason to plan for the next."""
        count = len(self._residuals)
        index = min(count - 2, math.ceil((1 - self._left_out) * (count + 1)) - 1)
        if index < 0:
            return 1.0
        return min(MOST_MARGIN, max(1.0, sorted(self._residuals)[index]))
