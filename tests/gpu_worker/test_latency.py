"""Predictions: curves never fall, corrections follow the machine, sizes that fit are the largest that do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_worker.engine.latency import Curve
from tests.gpu_worker.virtual import make_latency

points = st.lists(
    st.tuples(st.integers(1, 2000), st.floats(0.01, 500)), min_size=1, max_size=8, unique_by=lambda p: p[0]
).map(sorted)


@given(points=points, sizes=st.lists(st.integers(1, 4000), min_size=2, max_size=2))
def test_a_curve_never_falls_and_is_never_negative(points: list[tuple[int, float]], sizes: list[int]) -> None:
    curve = Curve([n for n, _ in points], [t for _, t in points])
    small, large = sorted(sizes)
    assert 0 <= curve(small) <= curve(large) + 1e-9


def test_a_curve_goes_through_its_points_and_on_beyond_them() -> None:
    curve = Curve([10, 20, 40], [1.0, 2.0, 6.0])
    assert [curve(n) for n in (0, 10, 15, 20, 40, 50)] == pytest.approx([0.0, 1.0, 1.5, 2.0, 6.0, 8.0])


def test_a_disturbed_point_is_lowered_to_what_more_tokens_took() -> None:
    curve = Curve([1, 4, 16], [9.0, 3.0, 5.0])
    assert curve(1) == 3.0 and curve(4) == 3.0 and curve(16) == 5.0


@given(budget_ms=st.floats(0, 200), beside=st.integers(0, 300), most=st.integers(0, 600))
def test_the_largest_size_that_fits_is_found(budget_ms: float, beside: int, most: int) -> None:
    latency = make_latency()
    size = latency.largest_chunk(budget_ms, beside, most)
    assert size == 0 or latency.forward_ms(beside + size) <= budget_ms
    assert size == most or latency.forward_ms(beside + size + 1) > budget_ms
    size = latency.largest_backward(budget_ms, most)
    assert size == 0 or latency.backward_ms(size) <= budget_ms
    assert size == most or latency.backward_ms(size + 1) > budget_ms


@pytest.mark.parametrize("slowness", [0.5, 1.0, 2.5])
def test_predictions_follow_a_machine_that_changed_its_speed(slowness: float) -> None:
    latency = make_latency()
    forward, backward = latency.forward(40) + latency.loss(30), 2 * latency.backward(30)
    for _ in range(60):
        latency.observe(40, 30, forward * slowness, [30, 30], backward * slowness, 1.0 * slowness)
    assert latency.forward_ms(40, 30) == pytest.approx(forward * slowness, rel=0.05)
    assert latency.backward_ms(30) == pytest.approx(latency.backward(30) * slowness, rel=0.05)
    assert latency.optimizer_ms == pytest.approx(slowness, rel=0.05)


def test_a_machine_that_jitters_is_planned_for_on_the_safe_side_of_its_mean() -> None:
    latency = make_latency()
    predicted = latency.forward(40)
    for i in range(200):
        latency.observe(40, 0, predicted * (1.5 if i % 2 else 1.0), [], 0.0, 0.0)
    assert latency.forward_ms(40) > 1.35 * predicted


def test_one_stall_does_not_shut_finetuning_out() -> None:
    latency = make_latency()
    before = latency.forward_ms(40)
    latency.observe(40, 0, 10_000.0, [], 0.0, 0.0)
    assert latency.forward_ms(40) < 2 * before
