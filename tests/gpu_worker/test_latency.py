"""Predictions: curves never fall, parts are corrected each by itself, sizes that fit are the largest that do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_worker.engine.latency import Curve, Work, largest
from tests.gpu_worker.virtual import make_latency

DECODES = Work(decodes=8, keys=400)
WINDOW = Work(window_tokens=30, loss_tokens=30)

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


@given(most=st.integers(0, 600), limit=st.integers(-1, 700))
def test_the_largest_size_that_fits_is_found(most: int, limit: int) -> None:
    assert largest(most, lambda n: n <= limit) == max(0, min(most, limit))


def test_what_rows_attend_to_costs_time() -> None:
    latency = make_latency()
    assert latency.forward_ms(Work(decodes=4, keys=4000)) == pytest.approx(2.4 + 4.0)
    assert latency.forward_ms(Work(window_tokens=40, pairs=8000)) == pytest.approx(6.0 + 0.8)
    assert latency.step_ms(Work(window_tokens=40, pairs=8000)) == pytest.approx(2.2 + 0.8)
    mixed = Work(decodes=4, keys=4000) + Work(window_tokens=40, pairs=8000, loss_tokens=40)
    assert latency.forward_ms(mixed) == pytest.approx(2.0 + 4.4 + 0.8 + 4.0 + 0.8)


def test_windows_are_counted_where_nobody_says_how_many() -> None:
    work = Work(decodes=2, keys=9) + Work(window_tokens=5) + Work(window_tokens=7, loss_tokens=7)
    assert (work.longest, work.windows, work.training_windows) == (5, 2, 1)
    assert sum([Work(decodes=1, keys=n) for n in (3, 9, 4)], Work()).longest == 9


def test_further_windows_cost_extra() -> None:
    latency = make_latency()
    latency.window_ms, latency.training_window_ms = 3.0, 5.0
    one = Work(window_tokens=40, loss_tokens=40)
    two = Work(window_tokens=20, loss_tokens=20) + Work(window_tokens=20, loss_tokens=20)
    assert latency.forward_ms(two) == pytest.approx(latency.forward_ms(one) + 8.0)


def test_an_iteration_is_judged_by_all_that_it_computed() -> None:
    latency = make_latency()
    expected = latency.forward_ms(WINDOW), 2 * latency.step_ms(WINDOW)
    latency.observe(WINDOW, expected[0], [WINDOW, WINDOW], expected[1])
    latency.observe(DECODES, 2 * latency.forward_ms(DECODES), [], 0.0)
    errors = latency.errors()
    assert errors["windows"].p95 == errors["backward_steps"].p95 == pytest.approx(0.0, abs=1e-9)
    assert errors["iteration"].count == 2 and errors["iteration"].p50 == pytest.approx(0.0, abs=1e-9)
    assert errors["decodes"].p95 == errors["iteration"].p95 == pytest.approx(1.0)
    assert errors["iteration"].exceeded == 0.5


def test_a_stall_in_an_optimizer_step_does_not_make_steps_too_long_to_schedule() -> None:
    latency = make_latency()
    latency.observe_update(10_000.0)
    assert 1.0 < latency.optimizer_ms < 1.3


@pytest.mark.parametrize("slowness", [0.5, 1.0, 2.5])
def test_predictions_follow_a_machine_that_changed_its_speed(slowness: float) -> None:
    latency, fresh = make_latency(), make_latency()
    forward_ms, backward_ms = fresh.forward_ms(WINDOW), 2 * fresh.step_ms(WINDOW)
    for _ in range(60):
        latency.observe(WINDOW, forward_ms * slowness, [WINDOW, WINDOW], backward_ms * slowness)
        latency.observe_update(slowness)
    assert latency.forward_ms(WINDOW) == pytest.approx(forward_ms * slowness, rel=0.05)
    assert 2 * latency.step_ms(WINDOW) == pytest.approx(backward_ms * slowness, rel=0.05)
    assert latency.optimizer_ms == pytest.approx(slowness, rel=0.05)


def test_slow_decodes_say_nothing_about_windows() -> None:
    latency = make_latency()
    before = latency.forward_ms(WINDOW)
    for _ in range(100):
        latency.observe(DECODES, 10 * make_latency().forward_ms(DECODES), [], 0.0)
    assert latency.forward_ms(DECODES) > 3 * make_latency().forward_ms(DECODES)
    assert latency.forward_ms(WINDOW) == before


def test_a_ratio_that_nothing_confirms_is_forgotten() -> None:
    latency = make_latency()
    usual = latency.forward_ms(WINDOW)
    for _ in range(50):
        latency.observe(WINDOW, 4 * usual, [WINDOW], 4.0)
    assert latency.forward_ms(WINDOW) > 3.5 * usual
    for _ in range(600):
        latency.observe(DECODES, latency.forward_ms(DECODES), [], 0.0)
    assert latency.forward_ms(WINDOW) < 1.2 * usual


def test_a_machine_that_jitters_is_planned_for_on_the_safe_side_of_its_mean() -> None:
    latency = make_latency()
    usual = latency.forward_ms(DECODES)
    for i in range(200):
        latency.observe(DECODES, usual * (1.5 if i % 2 else 1.0), [], 0.0)
    assert latency.forward_ms(DECODES) > 1.35 * usual


def test_one_stall_does_not_shut_finetuning_out() -> None:
    latency = make_latency()
    before = latency.forward_ms(WINDOW)
    latency.observe(WINDOW, 10_000.0, [], 0.0)
    assert latency.forward_ms(WINDOW) < 2 * before
