"""How long an iteration will take: measured at start-up, corrected while serving.

Three curves over tokens (fused forward, loss of a training window, backward of a window through one layer)
are profiled once and interpolated; each prediction is scaled by a running estimate of actual over predicted,
so that a machine that slows down is followed within a few iterations.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

PROFILE_SIZES = (1, 4, 16, 64, 128, 256, 512)  # tokens
SMOOTHING = 0.1  # weight of the newest iteration in the running ratio
DEVIATIONS = 1.0  # how many mean deviations a prediction stands above the mean


@dataclass(slots=True)
class Curve:
    """Milliseconds over tokens: linear between measured points and beyond them, never falling.

    Disturbances only ever add time, so a point above a later one is lowered to it.
    """

    sizes: list[int]
    times_ms: list[float]

    def __post_init__(self) -> None:
        for i in range(len(self.times_ms) - 2, -1, -1):
            self.times_ms[i] = min(self.times_ms[i], self.times_ms[i + 1])

    def __call__(self, num_tokens: int) -> float:
        if num_tokens <= 0:
            return 0.0
        if len(self.sizes) == 1:
            return self.times_ms[0]
        right = min(max(bisect_right(self.sizes, num_tokens), 1), len(self.sizes) - 1)
        x0, x1 = self.sizes[right - 1], self.sizes[right]
        y0, y1 = self.times_ms[right - 1], self.times_ms[right]
        return max(0.0, y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0))


@dataclass(slots=True)
class Correction:
    """Running mean of actual / predicted and of its deviation."""

    ratio: float = 1.0
    deviation: float = 0.0

    def observe(self, predicted_ms: float, actual_ms: float) -> None:
        if predicted_ms <= 0 or actual_ms <= 0:
            return
        sample = min(4.0, max(0.25, actual_ms / predicted_ms))
        self.deviation += SMOOTHING * (abs(sample - self.ratio) - self.deviation)
        self.ratio += SMOOTHING * (sample - self.ratio)

    @property
    def factor(self) -> float:
        return self.ratio + DEVIATIONS * self.deviation


@dataclass(slots=True)
class LatencyModel:
    """Predicts parts of an iteration in milliseconds, on the safe side of the mean."""

    forward: Curve
    loss: Curve
    backward: Curve
    optimizer_ms: float = 1.0
    _forward: Correction = field(default_factory=Correction)
    _backward: Correction = field(default_factory=Correction)

    def forward_ms(self, num_tokens: int, num_loss_tokens: int = 0) -> float:
        """One fused forward over `num_tokens`, of which `num_loss_tokens` also compute a loss."""
        return (self.forward(num_tokens) + self.loss(num_loss_tokens)) * self._forward.factor

    def backward_ms(self, num_tokens: int) -> float:
        """One layer backward over a window."""
        return self.backward(num_tokens) * self._backward.factor

    def largest_forward(self, budget_ms: float, num_tokens: int, num_loss_tokens: int, most: int) -> int:
        """How many tokens of a training window fit beside the others of an iteration; 0 where none do."""
        return _largest(most, lambda n: self.forward_ms(num_tokens + n, num_loss_tokens + n) <= budget_ms)

    def largest_chunk(self, budget_ms: float, num_tokens: int, most: int) -> int:
        """How many tokens of a prompt fit beside `num_tokens` others; 0 where none do."""
        return _largest(most, lambda n: self.forward_ms(num_tokens + n) <= budget_ms)

    def largest_backward(self, budget_ms: float, most: int) -> int:
        return _largest(most, lambda n: self.backward_ms(n) <= budget_ms)

    def observe(
        self,
        num_tokens: int,
        num_loss_tokens: int,
        forward_ms: float,
        backward_tokens: list[int],
        backward_ms: float,
        optimizer_ms: float,
    ) -> None:
        """Learns from one iteration."""
        self._forward.observe(self.forward(num_tokens) + self.loss(num_loss_tokens), forward_ms)
        self._backward.observe(sum(self.backward(n) for n in backward_tokens), backward_ms)
        if optimizer_ms > 0:
            self.optimizer_ms += 0.3 * (optimizer_ms - self.optimizer_ms)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Largest n in [0, most] with `fits(n)`, which holds up to some n and not beyond."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
