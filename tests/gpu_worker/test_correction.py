"""What follows a machine while it serves: how soon, how closely, and how often a plan is exceeded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from services.gpu_worker.engine.correction import HISTORY, Accuracy, Correction

Noise = Callable[[random.Random], float]
NOISES: dict[str, Noise] = {
    "calm": lambda rng: math.exp(rng.gauss(0, 0.02)),
    "noisy": lambda rng: math.exp(rng.gauss(0, 0.2)),
    "long tail": lambda rng: 1 + rng.expovariate(5),
    "stalls": lambda rng: 4.0 if rng.random() < 0.02 else 1 + 0.05 * rng.random(),
    "two speeds": lambda rng: 1.0 if rng.random() < 0.7 else 1.4,
}


def run(correction: Correction, actual: Callable[[int], float], count: int) -> list[tuple[float, float]]:
    """(planned, actual) of iterations that the table expects to take 10 ms."""
    found = []
    for i in range(count):
        actual_ms = 10 * actual(i)
        found.append((10 * correction.factor, actual_ms))
        correction.observe(10.0, actual_ms)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", NOISES)
def test_few_iterations_of_a_stationary_machine_take_longer_than_planned(kind: str, seed: int) -> None:
    rng, correction = random.Random(seed), Correction()
    found = run(correction, lambda _: NOISES[kind](rng), 2000)
    assert sum(actual > planned for planned, actual in found) <= 0.055 * len(found)


@pytest.mark.parametrize(("kind", "most"), [("calm", 1.06), ("noisy", 1.7), ("long tail", 1.9)])
def test_a_plan_is_no_larger_than_the_noise_asks_for(kind: str, most: float) -> None:
    rng, correction = random.Random(7), Correction()
    found = run(correction, lambda _: NOISES[kind](rng), 2000)[200:]
    assert sum(planned for planned, _ in found) < most * sum(actual for _, actual in found)


@pytest.mark.parametrize("slowness", [0.5, 2.0, 5.0])
def test_another_speed_is_followed_within_twenty_iterations_and_back(slowness: float) -> None:
    rng, correction = random.Random(1), Correction()

    def actual(i: int) -> float:
        return (slowness if 500 <= i < 1000 else 1.0) * NOISES["calm"](rng)

    found = run(correction, actual, 1500)
    for start, speed in ((200, 1.0), (520, slowness), (1020, 1.0)):
        planned = [planned for planned, _ in found[start : start + 300]]
        assert max(planned) < 1.15 * 10 * speed and min(planned) > 0.95 * 10 * speed


@pytest.mark.parametrize("at", [0, 5, 15, 40, 300])
def test_a_single_disturbance_changes_next_to_nothing(at: int) -> None:
    rng, correction = random.Random(2), Correction()
    found = run(correction, lambda i: 100.0 if i == at else NOISES["calm"](rng), 400)
    assert max(planned for planned, _ in found) < 11


def test_three_disturbances_in_a_row_do_not_move_the_level() -> None:
    correction = Correction()
    run(correction, lambda i: 6.0 if 50 <= i < 53 else 1.0, 56)
    assert correction.level == 1.0


def test_what_is_never_seen_again_is_forgotten() -> None:
    correction = Correction()
    run(correction, lambda _: 4.0, 50)
    assert correction.factor == 4.0
    for _ in range(150):
        correction.observe(0.0, 0.0)
    assert correction.factor == 1.0


def test_the_same_timings_make_the_same_correction() -> None:
    """Ranks correct themselves by rank 0's timings, each on its own."""
    factors = []
    for _ in range(2):
        correction = Correction()
        run(correction, lambda i: NOISES["noisy"](random.Random(i)), 300)
        factors.append(correction.factor)
    assert factors[0] == factors[1]


def test_errors_tell_the_expectation_from_the_plan() -> None:
    accuracy = Accuracy()
    for actual in range(1, 101):
        accuracy.add(100.0, 190.5, 100.0 + actual)
    found = accuracy.errors()
    assert (found.count, found.p50, found.p95) == (100, pytest.approx(0.5), pytest.approx(0.95))
    assert found.exceeded == pytest.approx(0.1) and found.margin == pytest.approx(1.905)


def test_errors_are_of_the_last_predictions() -> None:
    accuracy = Accuracy()
    assert accuracy.errors().count == 0
    for _ in range(100):
        accuracy.add(1.0, 1.0, 5.0)
    for _ in range(HISTORY):
        accuracy.add(1.0, 1.0, 1.0)
    assert accuracy.errors().p95 == 0 and accuracy.errors().count == HISTORY
