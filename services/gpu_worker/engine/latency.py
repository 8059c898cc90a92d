"""How long an iteration will take: a table measured at start-up, corrected while serving.

Source: FlexLLM (arXiv 2402.18789), section 6, whose scheduler needs the time of a batch before it runs it. Published
profiles of such engines jump as soon as one finetuning token is added, stay flat, then climb in stairs, so
nothing here is assumed to be a straight line: what counts is measured at several points (`engine/fit.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from services.gpu_worker.engine.correction import Accuracy, Correction, Errors

WINDOW_CAUTION = 0.4  # 1: the whole margin, 0: none


class StepKind(Enum):
    """What a step computes: one window of a training sequence through one layer, or its loss. The rarest first."""

    FIRST_BACKWARD = "first_backward"  # no layer above has gone through the window
    LOSS = "loss"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(slots=True)
class Work:
    """What one fused forward, or one step, has to compute; never changed. (Not frozen: the scheduler makes dozens in a
    decision, and a frozen one takes three times as long to make.)

    The last three fields follow from the others where they are left out: decodes with equally many keys, one
    window, and one of a job where there are training tokens.
    """

    decodes: int = 0  # rows of one token a sequence
    keys: int = 0  # that decodes read
    window_tokens: int = 0  # rows of prompts and of training windows
    pairs: int = 0  # of such a row and a key from before its window
    loss_tokens: int = 0  # rows of training windows
    longest: int = 0  # keys of the decode that reads most: all others are padded to it
    windows: int = 0  # of prompts and of training
    training_windows: int = 0
    kind: StepKind | None = None  # of a step

    def __post_init__(self) -> None:
        if self.decodes and not self.longest:
            self.longest = -(-self.keys // self.decodes)
        if self.window_tokens and not self.windows:
            self.windows = 1
        if self.loss_tokens and not self.training_windows:
            self.training_windows = 1

    def __add__(self, other: Work) -> Work:
        return Work(
            self.decodes + other.decodes,
            self.keys + other.keys,
            self.window_tokens + other.window_tokens,
            self.pairs + other.pairs,
            self.loss_tokens + other.loss_tokens,
            max(self.longest, other.longest),
            self.windows + other.windows,
            self.training_windows + other.training_windows,
        )


@dataclass(slots=True)
class Curve:
    """Milliseconds over tokens: linear between measured points and beyond them, never falling, 0 for none.

    Disturbances only ever add time, so a point above a later one is lowered to it.
    """

    sizes: list[int]  # ascending
    times_ms: list[float]
    _pieces: list[tuple[float, float]] = field(init=False, repr=False, compare=False)  # (at 0, a token)

    def __post_init__(self) -> None:
        for i in range(len(self.times_ms) - 2, -1, -1):
            self.times_ms[i] = min(self.times_ms[i], self.times_ms[i + 1])
        self._pieces = [(self.times_ms[0], 0.0)] if len(self.sizes) == 1 else []
        for (x0, y0), (x1, y1) in pairwise(zip(self.sizes, self.times_ms, strict=True)):
            slope = (y1 - y0) / (x1 - x0)
            self._pieces.append((y0 - slope * x0, slope))

    def __call__(self, num_tokens: int) -> float:
        if num_tokens <= 0:
            return 0.0
        last = len(self._pieces) - 1
        at_zero, slope = self._pieces[bisect_right(self.sizes, num_tokens, 1, last + 1) - 1]
        time_ms = at_zero + slope * num_tokens
        return time_ms if time_ms > 0.0 else 0.0


def nothing() -> Curve:
    return Curve([0], [0.0])


@dataclass(slots=True)
class LatencyModel:
    """Predicts parts of an iteration in milliseconds, so that few take longer.

    Where windows are, decodes are rows of theirs: the weights are read once. What each kind of rows needs beside
    the products that all share comes on top. Corrections are by part, because what slows one down, such as adapters
    among the decodes, says little about the others.
    """

    forward: Curve  # over rows: one window without keys before it, and decodes beside it
    training: Curve  # over training rows, on top: their bypasses, what they keep, their loss
    layer: Curve  # over a window's rows, forward through one layer
    loss: Curve  # over a window's rows
    backward: Curve  # over a window's rows, through one layer
    optimizer_ms: float = 1.0
    keys: Curve = field(default_factory=nothing)  # over decodes times the longest one's keys, on top
    pairs: Curve = field(default_factory=nothing)  # over windows' pairs, on top; through all layers
    layer_pairs: Curve = field(default_factory=nothing)  # through one
    backward_pairs: Curve = field(default_factory=nothing)  # the same of a backward
    decodes: Curve | None = None  # over decodes alone; as `forward` where there is none
    beside: Curve = field(default_factory=nothing)  # over decodes, on top where there are windows too
    window_ms: float = 0.0  # on top for each window after the first
    training_window_ms: float = 0.0  # the same for training windows: a further job's bypasses
    _accuracy: Accuracy = field(default_factory=Accuracy)
    _decodes: Correction = field(default_factory=Correction)
    _windows: Correction = field(default_factory=Correction)
    _steps: dict[StepKind, Correction] = field(
        default_factory=lambda: {kind: Correction() for kind in StepKind}
    )

    def forward_ms(self, work: Work) -> float:
        """One fused forward."""
        return self.table_forward_ms(work) * self.forward_correction(work).factor

    def step_ms(self, work: Work) -> float:
        """One step. A backward's first layer prepares what the others find ready: masks, and what libraries make for
        sizes that they have not seen."""
        return self.table_step_ms(work) * self.step_correction(work).factor

    def expected_forward_ms(self, work: Work) -> float:
        """With a part of the margin: for training windows, whose iterations may now and then take longer than they
        should, for the time promised between tokens is a mean."""
        correction = self.forward_correction(work)
        margin: float = correction.margin**WINDOW_CAUTION
        return self.table_forward_ms(work) * correction.level * margin

    def expected_step_ms(self, work: Work) -> float:
        """Without the margin: for what can be left out where it takes longer."""
        return self.table_step_ms(work) * self.step_correction(work).level

    def step_correction(self, work: Work) -> Correction:
        return self._steps[work.kind or StepKind.BACKWARD]

    def forward_correction(self, work: Work) -> Correction:
        return self._windows if work.window_tokens else self._decodes

    def table_forward_ms(self, work: Work) -> float:
        """As measured at start-up."""
        decodes_ms = (self.decodes or self.forward)(work.decodes)
        context_ms = self.keys(work.decodes * work.longest) + self.pairs(work.pairs)
        if not work.window_tokens:
            return decodes_ms + context_ms
        rows_ms = self.forward(work.decodes + work.window_tokens) + self.beside(work.decodes)
        further_ms = self.window_ms * (work.windows - 1)
        if work.training_windows:
            further_ms += self.training_window_ms * (work.training_windows - 1)
        return max(decodes_ms, rows_ms) + context_ms + self.training(work.loss_tokens) + further_ms

    def table_step_ms(self, work: Work) -> float:
        if work.kind is StepKind.LOSS:
            return self.loss(work.window_tokens)
        if work.kind is StepKind.FORWARD:
            return self.layer(work.window_tokens) + self.layer_pairs(work.pairs)
        return self.backward(work.window_tokens) + self.backward_pairs(work.pairs)

    # --- while serving

    def observe(self, forward: Work, forward_ms: float, steps: list[Work], steps_ms: float) -> None:
        """Learns from one iteration's windows, or one lane's. Of the kinds of steps that a good part of the time went
        to the rarest learns from it, less what the others should have taken."""
        fused_ms, correction = self.table_forward_ms(forward), self.forward_correction(forward)
        table_ms = dict.fromkeys(StepKind, 0.0)
        for work in steps:
            table_ms[work.kind or StepKind.BACKWARD] += self.table_step_ms(work)
        expected_ms = {kind: ms * self._steps[kind].level for kind, ms in table_ms.items()}
        planned_ms = sum(ms * self._steps[kind].factor for kind, ms in table_ms.items())
        all_ms = sum(expected_ms.values())
        self._accuracy.add(
            fused_ms * correction.level + all_ms,
            fused_ms * correction.factor + planned_ms,
            forward_ms + steps_ms,
        )
        for other in (self._decodes, self._windows):
            other.observe(fused_ms if other is correction else 0.0, forward_ms)
        if not all_ms:
            for step in self._steps.values():
                step.observe(0.0, 0.0)
            return
        learner = next(kind for kind in StepKind if expected_ms[kind] >= all_ms / len(StepKind))
        others_ms = all_ms - expected_ms[learner]
        self._steps[learner].observe(table_ms[learner], steps_ms - others_ms)

    def observe_update(self, optimizer_ms: float) -> None:
        """Learns from what an optimizer step has taken, or would have: part of the way to that, and no further than
        one disturbance should take it."""
        if optimizer_ms > 0 and self.optimizer_ms > 0:
            self.optimizer_ms *= min(2.0, max(0.5, optimizer_ms / self.optimizer_ms)) ** 0.3

    def judge_with(self, other: LatencyModel) -> None:
        """Both models' predictions are from now on judged as one's."""
        self._accuracy = other._accuracy

    def errors(self) -> dict[str, Errors]:
        """Of the last iterations, and of the parts that are corrected each by itself."""
        return {
            "iteration": self._accuracy.errors(),
            "decodes": self._decodes.accuracy.errors(),
            "windows": self._windows.accuracy.errors(),
            **{f"{kind.value}_steps": step.accuracy.errors() for kind, step in self._steps.items()},
        }


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
