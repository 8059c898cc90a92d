"""Makes a latency model of a few dozen measurements. Decides without tensors: the machine is behind a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gpu_worker.engine.latency import Curve, LatencyModel, Work

Span = tuple[int, int]  # tokens [start, end) of a sequence
SHORT = 16  # tokens of a context whose keys do not count
SMALL, LARGE = 32, 256  # tokens of windows that are measured beside others
LONG_MS = 500.0  # iterations are shorter
FACTOR = 1.5  # by which a kept model may be off in either direction: more is another machine, or a busy one


@dataclass(frozen=True, slots=True)
class Extent:
    """Up to where a machine is measured; beyond, the last slope goes on."""

    decodes: int  # sequences that run at once
    context: int  # tokens of one
    keys: int  # tokens that the cache holds
    rows: int  # of prompts and training in one forward
    window: int  # of one training window
    sequence: int  # tokens of a training sequence


class Machine(Protocol):
    """Runs work, and returns the milliseconds that it takes where nothing disturbs it."""

    def forward(
        self,
        *,
        decodes: int = 0,
        context: int = SHORT,
        prompts: Sequence[Span] = (),
        windows: Sequence[Span] = (),
    ) -> float:
        """One fused forward; each window is another job's, of two at most, and starts its sequence."""

    def layer(self, start: int, end: int) -> float:
        """A training window forward through one layer."""

    def loss(self, num_tokens: int) -> float:
        """Of a training window."""

    def backward(self, start: int, end: int) -> float:
        """A window through the last layer."""

    def optimizer(self) -> float:
        """One step."""


def sizes(first: int, last: int) -> list[int]:
    """`first`, then powers of two from 16 on, then `last`."""
    between = [2**i for i in range(4, 31) if first < 2**i < last]
    return [first, *between, last] if first < last else [last]


def fit(machine: Machine, extent: Extent) -> LatencyModel:
    """Every part alone, then what it costs beside the others over what the model would have said."""
    alone = sizes(2, extent.rows)
    counts = [n for n in (1, 2, 4, 8, *sizes(16, extent.decodes)) if n < extent.decodes] + [extent.decodes]
    windows = sizes(1, extent.window)
    model = LatencyModel(
        optimizer_ms=machine.optimizer(),
        layer=_curve(windows, lambda n: machine.layer(0, n)),
        loss=_curve(windows, machine.loss),
        backward=_curve(windows, lambda n: machine.backward(0, n)),
        forward=_forwards(alone, lambda n: machine.forward(prompts=[(0, n)])),
        training=Curve([0], [0.0]),
        decodes=_curve(counts, lambda n: machine.forward(decodes=n)),
    )
    windows = [n for n in windows if n <= model.forward.sizes[-1]]
    model.training = _curve(windows, lambda n: machine.forward(windows=[(0, n)]) - model.forward(n))
    model.keys = _keys(machine, extent, model)
    model.pairs = _pairs(
        extent.context, extent.rows // 2, lambda a, b: machine.forward(prompts=[(a, b)]), model.forward
    )
    model.layer_pairs = _pairs(extent.sequence, extent.window, machine.layer, model.layer)
    model.backward_pairs = _pairs(extent.sequence, extent.window, machine.backward, model.backward)
    model.beside = _beside(machine, extent, model)
    _fit_further_windows(machine, min(SMALL, extent.window), model)
    return model


def agrees(machine: Machine, extent: Extent, model: LatencyModel) -> bool:
    """Whether the machine is the one that `model` was made of, and as fast: three quick measurements."""
    window = min(SMALL, extent.window)
    work = Work(decodes=extent.decodes, keys=extent.decodes * SHORT)
    mixed = work + Work(window_tokens=window, loss_tokens=window)
    windows = [(0, window)]
    return all(
        expected_ms / FACTOR <= measured_ms <= expected_ms * FACTOR
        for expected_ms, measured_ms in (
            (model.table_forward_ms(work), machine.forward(decodes=extent.decodes)),
            (model.table_forward_ms(mixed), machine.forward(decodes=extent.decodes, windows=windows)),
            (model.backward(window), machine.backward(0, window)),
        )
    )


def _forwards(points: list[int], measure: Callable[[int], float]) -> Curve:
    """As far as an iteration may get: what takes longer goes on from there as it rose before."""
    times_ms: list[float] = []
    for n in points:
        times_ms.append(measure(n))
        if times_ms[-1] > LONG_MS and len(times_ms) > 1:
            break
    return Curve(points[: len(times_ms)], times_ms)


def _curve(points: list[int], measure: Callable[[int], float]) -> Curve:
    return Curve(points, [max(0.0, measure(n)) for n in points])


def _extra(found: dict[int, float]) -> Curve:
    """What is added to another curve: nothing at 0."""
    points = sorted(found)
    return Curve([0, *points], [0.0, *(max(0.0, found[n]) for n in points)])


def _keys(machine: Machine, extent: Extent, model: LatencyModel) -> Curve:
    """Over keys in all: a few long contexts, then many shorter ones up to what the cache holds."""
    assert model.decodes is not None
    most = min(extent.context, extent.keys // extent.decodes)
    found = {}
    for count, context in ((1, extent.context), *((extent.decodes, most // n) for n in (8, 2, 1))):
        if context > SHORT:
            whole_ms = machine.forward(decodes=count, context=context)
            found[count * context] = whole_ms - model.decodes(count)
    return _extra(found)


def _pairs(longest: int, window: int, measure: Callable[[int, int], float], rows: Curve) -> Curve:
    """Of a small window and of a large one at the end of the longest sequence, and of a small one near its start."""
    small, large = (min(n, window) for n in (SMALL, LARGE))
    spans = ((longest // 8, longest // 8 + small), (longest - small, longest), (longest - large, longest))
    return _extra({(b - a) * a: measure(a, b) - rows(b - a) for a, b in spans if 0 < a < b <= longest})


def _beside(machine: Machine, extent: Extent, model: LatencyModel) -> Curve:
    """Of one decode and of all of them, beside a small prompt and a larger one."""
    found = {}
    lengths = sorted({min(n, extent.rows) for n in (SMALL, LARGE // 2)})
    for count in sorted({1, extent.decodes}):
        over = [
            machine.forward(decodes=count, prompts=[(0, n)])
            - model.table_forward_ms(Work(decodes=count, window_tokens=n))
            for n in lengths
        ]
        found[count] = sum(over) / len(over)
    return _extra(found)


def _fit_further_windows(machine: Machine, length: int, model: LatencyModel) -> None:
    """A second window over one of twice the length."""
    span, rows = (0, length), 2 * length
    two_ms = machine.forward(prompts=[span, span])
    model.window_ms = max(0.0, two_ms - model.table_forward_ms(Work(window_tokens=rows)))
    trained = Work(window_tokens=rows, loss_tokens=rows, windows=2)
    model.training_window_ms = max(
        0.0, machine.forward(windows=[span, span]) - model.table_forward_ms(trained)
    )
