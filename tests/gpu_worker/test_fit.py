"""Models made of measurements on machines whose costs are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from services.gpu_worker.engine.fit import SHORT, Extent, Span, agrees, fit, sizes
from services.gpu_worker.engine.latency import StepKind, Work

EXTENT = Extent(decodes=16, context=2048, keys=40_000, rows=768, window=256, sequence=768)


@dataclass(slots=True)
class VirtualMachine:
    """Reads all weights, then adds what each kind of rows needs; products come in tiles of rows."""

    weights_ms: float = 12.0
    tile: int = 1
    first_training_ms: float = 14.0  # the jump that one finetuning token makes
    beside_ms: float = 3.0  # of decodes beside windows
    disturbed: float = 0.0  # runs may take longer by up to this share
    slowness: float = 1.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def forward(
        self,
        *,
        decodes: int = 0,
        context: int = SHORT,
        prompts: Sequence[Span] = (),
        windows: Sequence[Span] = (),
    ) -> float:
        spans = [*prompts, *windows]
        rows = decodes + sum(b - a for a, b in spans)
        cost = self.weights_ms + 0.2 * self.tile * -(-rows // self.tile) + 0.001 * decodes * context
        cost += sum(0.0002 * (b - a) * (a + (b - a) / 2) for a, b in spans)
        cost += 1.5 * max(0, len(spans) - 1)
        cost += sum(self.first_training_ms + 0.25 * (b - a) for a, b in windows)
        if spans and decodes:
            cost += self.beside_ms + 0.05 * decodes
        return self._fastest(cost)

    def layer(self, start: int, end: int) -> float:
        n = end - start
        return self._fastest(1.0 + 0.02 * self.tile * -(-n // self.tile) + 1e-5 * n * (start + n / 2))

    def loss(self, num_tokens: int) -> float:
        return self._fastest(0.5 + 0.04 * num_tokens)

    def backward(self, start: int, end: int) -> float:
        n = end - start
        return self._fastest(1.5 + 0.03 * self.tile * -(-n // self.tile) + 2e-5 * n * (start + n / 2))

    def optimizer(self) -> float:
        return self._fastest(5.0)

    def _fastest(self, cost_ms: float) -> float:
        return self.slowness * cost_ms * (1 + min(self.rng.random() for _ in range(3)) * self.disturbed)


MIXES: tuple[dict[str, Any], ...] = (
    {"decodes": 3, "context": 300},
    {"decodes": 7, "context": 900},
    {"decodes": 13, "context": 1500},
    {"prompts": [(0, 200)]},
    {"prompts": [(700, 900)]},
    {"windows": [(0, 1)]},
    {"windows": [(0, 100)]},
    {"decodes": 1, "context": 700, "windows": [(0, 30)]},
    {"decodes": 5, "context": 400, "prompts": [(0, 60)]},
    {"decodes": 12, "context": 250, "windows": [(0, 180)]},
    {"decodes": 8, "context": 600, "prompts": [(512, 600)], "windows": [(0, 90)]},
    {"prompts": [(0, 40), (0, 70), (100, 220)]},
    {"windows": [(0, 50), (0, 120)]},
)


def work_of(
    decodes: int = 0, context: int = 0, prompts: Sequence[Span] = (), windows: Sequence[Span] = ()
) -> Work:
    work = Work(decodes=decodes, keys=decodes * context)
    for start, end in prompts:
        work += Work(window_tokens=end - start, pairs=(end - start) * start)
    for start, end in windows:
        work += Work(window_tokens=end - start, pairs=(end - start) * start, loss_tokens=end - start)
    return work


def error(machine: VirtualMachine, mix: dict[str, Any]) -> float:
    model = fit(machine, EXTENT)
    true = replace(machine, disturbed=0.0)
    return abs(true.forward(**mix) / model.table_forward_ms(work_of(**mix)) - 1)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixed_batches_are_predicted_from_their_parts(mix: dict[str, Any]) -> None:
    assert error(VirtualMachine(), mix) < 0.1


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_stairs_of_tiles_and_disturbed_runs_cost_little_accuracy(mix: dict[str, Any]) -> None:
    assert error(VirtualMachine(tile=32, disturbed=0.1), mix) < 0.25


def test_the_first_finetuning_token_makes_the_jump_that_it_makes() -> None:
    model = fit(VirtualMachine(), EXTENT)
    decodes = Work(decodes=8, keys=8 * 100)
    jump = model.table_forward_ms(decodes + Work(window_tokens=1, loss_tokens=1)) - model.table_forward_ms(
        decodes
    )
    assert jump == pytest.approx(14.0 + 3.0 + 8 * 0.05 + 0.45, rel=0.15)


def test_decodes_beside_a_window_cost_less_than_alone() -> None:
    model = fit(VirtualMachine(), EXTENT)
    decodes, window = Work(decodes=8, keys=8 * 100), Work(window_tokens=100)
    alone = model.table_forward_ms(decodes) + model.table_forward_ms(window)
    assert model.table_forward_ms(decodes) < model.table_forward_ms(decodes + window) < 0.85 * alone


def test_ragged_decodes_cost_what_they_are_padded_to() -> None:
    model = fit(VirtualMachine(), EXTENT)
    ragged = Work(decodes=1, keys=2000) + Work(decodes=7, keys=7 * 100)
    even = Work(decodes=8, keys=8 * 2000)
    assert model.table_forward_ms(ragged) == model.table_forward_ms(even)


@pytest.mark.parametrize("span", [(0, 40), (0, 256), (300, 400), (640, 768)])
def test_steps_are_predicted(span: Span) -> None:
    machine = VirtualMachine()
    start, end = span
    model = fit(machine, EXTENT)

    def predicted(kind: StepKind) -> float:
        return model.table_step_ms(Work(window_tokens=end - start, pairs=(end - start) * start, kind=kind))

    assert predicted(StepKind.FORWARD) == pytest.approx(machine.layer(start, end), rel=0.1)
    assert predicted(StepKind.LOSS) == pytest.approx(machine.loss(end - start), rel=0.1)
    for kind in (StepKind.BACKWARD, StepKind.FIRST_BACKWARD):
        assert predicted(kind) == pytest.approx(machine.backward(start, end), rel=0.1)


@pytest.mark.parametrize("tile", [1, 64])
def test_more_work_never_takes_less_time(tile: int) -> None:
    model = fit(VirtualMachine(tile=tile, disturbed=0.5), EXTENT)
    for decodes in (0, 1, 9, 16):
        beside = Work(decodes=decodes, keys=decodes * 500)
        times = [
            model.table_forward_ms(beside + Work(window_tokens=n, loss_tokens=n)) for n in range(1, 300, 7)
        ]
        assert times == sorted(times)
        assert times[0] >= model.table_forward_ms(beside)


@pytest.mark.parametrize("decodes", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 5, 40])
def test_the_smallest_engines_are_measured_too(decodes: int, rows: int) -> None:
    extent = Extent(decodes, context=16, keys=64, rows=rows, window=min(rows, 3), sequence=rows)
    model = fit(VirtualMachine(), extent)
    assert 12 < model.table_forward_ms(Work(decodes=decodes, keys=decodes * 10)) < 14
    assert model.table_forward_ms(Work(window_tokens=rows)) == pytest.approx(12 + 0.2 * rows, rel=0.02)


def test_no_context_exceeds_what_the_cache_holds() -> None:
    largest = []

    @dataclass(slots=True)
    class Watched(VirtualMachine):
        def forward(self, **work: Any) -> float:
            largest.append(int(work.get("decodes", 0)) * int(work.get("context", SHORT)))
            return VirtualMachine.forward(self, **work)

    fit(Watched(), replace(EXTENT, keys=5000))
    assert max(largest) <= 5000


def test_points_are_close_where_curves_bend() -> None:
    assert sizes(2, 100) == [2, 16, 32, 64, 100]
    assert sizes(1, 16) == [1, 16]
    assert sizes(2, 1) == [1]


@pytest.mark.parametrize(
    ("slowness", "holds"), [(1.0, True), (1.3, True), (0.75, True), (2.0, False), (0.5, False)]
)
def test_a_kept_model_holds_for_a_machine_as_fast(slowness: float, holds: bool) -> None:
    model = fit(VirtualMachine(), EXTENT)
    assert agrees(VirtualMachine(slowness=slowness), EXTENT, model) is holds


def test_a_kept_model_does_not_hold_where_training_alone_has_changed() -> None:
    model = fit(VirtualMachine(), EXTENT)
    assert not agrees(VirtualMachine(first_training_ms=60.0), EXTENT, model)


def test_forwards_longer_than_any_iteration_are_not_measured_but_foreseen() -> None:
    taken: list[float] = []

    @dataclass(slots=True)
    class Watched(VirtualMachine):
        def forward(self, **work: Any) -> float:
            taken.append(VirtualMachine.forward(self, **work))
            return taken[-1]

    machine, extent = Watched(slowness=4.0), replace(EXTENT, rows=4096, sequence=4096)
    model = fit(machine, extent)
    assert 500 < max(taken) < 1000
    whole = [(0, 800)]
    assert model.table_forward_ms(work_of(prompts=whole)) == pytest.approx(
        machine.forward(prompts=whole), rel=0.2
    )
