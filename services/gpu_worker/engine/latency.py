"""How long an iteration will take: measured at start-up, corrected while serving.

Three curves over tokens (fused forward, loss of a training window, backward of a window through one layer)
and the price of what rows attend to are profiled once. Each prediction is scaled by what the last iterations
took over what was predicted for them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

PROFILE_SIZES = (1, 4, 16, 64, 128, 256, 512)  # tokens
MEMORY = 24  # iterations that a correction is made from
QUANTILE = 0.75  # of their ratios: predictions stand on the safe side of the median
MOST = 8.0  # what slows a machine down by more is no rule
FORGET_EVERY = 10  # iterations without such work, for each ratio


@dataclass(frozen=True, slots=True)
class Work:
    """What one fused forward, or the backward of one window through one layer, has to compute."""

    decodes: int = 0  # rows of one token a sequence
    keys: int = 0  # that decodes read
    window_tokens: int = 0  # rows of prompts and of training windows
    pairs: int = 0  # of such a row and a key from before its window
    loss_tokens: int = 0  # rows of training windows

    def __add__(self, other: Work) -> Work:
        return Work(
            self.decodes + other.decodes,
            self.keys + other.keys,
            self.window_tokens + other.window_tokens,
            self.pairs + other.pairs,
            self.loss_tokens + other.loss_tokens,
        )


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
    """Actual over predicted in the last iterations, of which a high quantile counts: a machine that slows down
    is followed, a single disturbance is not."""

    samples: deque[float] = field(default_factory=lambda: deque([1.0] * 8, maxlen=MEMORY))
    _unobserved: int = 0

    def observe(self, predicted_ms: float, actual_ms: float) -> None:
        """Without anything to observe the past is slowly forgotten: else a ratio that keeps work from being
        scheduled would never be put right."""
        if predicted_ms > 0 and actual_ms > 0:
            self.samples.append(min(MOST, max(1 / MOST, actual_ms / predicted_ms)))
            self._unobserved = 0
            return
        self._unobserved += 1
        if self.samples and self._unobserved % FORGET_EVERY == 0:
            self.samples.popleft()

    @property
    def factor(self) -> float:
        if not self.samples:
            return 1.0
        return sorted(self.samples)[int(QUANTILE * (len(self.samples) - 1))]


@dataclass(slots=True)
class LatencyModel:
    """Predicts parts of an iteration in milliseconds, on the safe side of the mean.

    Iterations of decodes alone have a correction of their own: what slows them down, such as long contexts,
    says little about windows.
    """

    forward: Curve
    loss: Curve
    backward: Curve
    optimizer_ms: float = 1.0
    key_ms: float = 0.0  # a decode's key
    pair_ms: float = 0.0  # a window's pair, forward through all layers
    backward_pair_ms: float = 0.0  # backward through one
    _decodes: Correction = field(default_factory=Correction)
    _windows: Correction = field(default_factory=Correction)
    _backward: Correction = field(default_factory=Correction)

    def forward_ms(self, work: Work) -> float:
        """One fused forward."""
        correction = self._windows if work.window_tokens else self._decodes
        return self._plain_forward_ms(work) * correction.factor

    def backward_ms(self, work: Work) -> float:
        """One window backward through one layer."""
        return self._plain_backward_ms(work) * self._backward.factor

    def _plain_forward_ms(self, work: Work) -> float:
        rows_ms = self.forward(work.decodes + work.window_tokens) + self.loss(work.loss_tokens)
        return rows_ms + work.keys * self.key_ms + work.pairs * self.pair_ms

    def _plain_backward_ms(self, work: Work) -> float:
        return self.backward(work.window_tokens) + work.pairs * self.backward_pair_ms

    def observe(
        self,
        forward: Work,
        forward_ms: float,
        backwards: list[Work],
        backward_ms: float,
        optimizer_ms: float,
    ) -> None:
        """Learns from one iteration; `optimizer_ms` is that of one step, 0 where there was none."""
        predicted_ms = self._plain_forward_ms(forward)
        has_windows = forward.window_tokens > 0
        self._windows.observe(predicted_ms if has_windows else 0.0, forward_ms)
        self._decodes.observe(0.0 if has_windows else predicted_ms, forward_ms)
        self._backward.observe(sum(self._plain_backward_ms(work) for work in backwards), backward_ms)
        if optimizer_ms > 0:
            self.optimizer_ms += 0.3 * (optimizer_ms - self.optimizer_ms)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Largest n in [0, most] with `fits(n)`, which holds up to some n and not beyond; 0 where none does."""
    if fits(most):
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
