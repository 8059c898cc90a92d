"""Which requests met their service level, judged by their tokens' times."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gpu_worker.engine.attainment import Attainment, TierCounts
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_config, make_engine, prompt_of, run

SLOS = {"priority": SLO(50.0, 100.0, rank=0), DEFAULT_TIER: SLO(100.0, 1000.0), "flex": SLO(1e9, 1e9, rank=2)}
ARRIVAL_S = 10.0


def make_sequence(token_times_s: list[float], tier: str = DEFAULT_TIER, num_resumed: int = 0) -> Sequence:
    """A prompt of one token, `num_resumed` of another worker's, and one at each of the times after arrival."""
    resumed = {"num_resumed_tokens": num_resumed, "arrival_s": ARRIVAL_S}
    sequence = Sequence("r", [0] * (1 + num_resumed), 1, tier=tier, slo=SLOS[tier], **resumed)  # type: ignore[arg-type]
    for time_s in token_times_s:
        sequence.expect(ARRIVAL_S)
        sequence.fill(0, ARRIVAL_S + time_s)
    return sequence


def finished(sequence: Sequence, after_s: float = 9.0) -> TierCounts:
    attainment = Attainment(SLOS)
    attainment.finish(sequence, ARRIVAL_S + after_s)
    return attainment.tiers[sequence.tier]


def aborted(sequence: Sequence, after_s: float) -> TierCounts:
    attainment = Attainment(SLOS)
    attainment.abort(sequence, ARRIVAL_S + after_s)
    return attainment.tiers[sequence.tier]


def judged(counts: TierCounts) -> tuple[int, int, int, int]:
    return counts.ttft_met, counts.ttft_missed, counts.tpot_met, counts.tpot_missed


@pytest.mark.parametrize(
    ("times", "tier", "expected"),
    [
        ([0.5, 0.55, 0.6], DEFAULT_TIER, (1, 0, 1, 0)),
        ([0.5, 0.55, 0.6], "priority", (0, 1, 1, 0)),
        ([0.09, 0.15, 0.21], "priority", (1, 0, 0, 1)),
        ([1.5, 2.0, 2.5], DEFAULT_TIER, (0, 1, 0, 1)),
        ([1.5, 2.0, 2.5], "flex", (1, 0, 1, 0)),
    ],
)
def test_a_request_is_judged_by_the_targets_of_its_tier(
    times: list[float], tier: str, expected: tuple[int, ...]
) -> None:
    counts = finished(make_sequence(times, tier))
    assert judged(counts) == expected
    assert counts.ttft_ms_sum == pytest.approx(times[0] * 1000)
    assert counts.tpot_ms_sum == pytest.approx((times[-1] - times[0]) * 1000 / 2)


def test_the_mean_gap_counts_not_the_longest() -> None:
    assert judged(finished(make_sequence([0.1, 0.26, 0.28]))) == (1, 0, 1, 0)


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert judged(finished(make_sequence([0.5]))) == (1, 0, 0, 0)


def test_an_answer_without_a_token_is_there_at_its_end() -> None:
    assert judged(finished(make_sequence([]), after_s=0.9)) == (1, 0, 0, 0)
    assert judged(finished(make_sequence([]), after_s=1.1)) == (0, 1, 0, 0)


def test_of_a_request_that_another_worker_began_only_the_gaps_here_count() -> None:
    counts = finished(make_sequence([5.0, 5.05, 5.1], num_resumed=7))
    assert judged(counts) == (0, 0, 1, 0)
    assert counts.tpot_ms_sum == pytest.approx(50.0)
    assert judged(finished(make_sequence([5.0], num_resumed=7))) == (0, 0, 0, 0)


def test_who_leaves_before_the_first_token_was_due_is_not_counted_and_who_leaves_after_it_is() -> None:
    assert judged(aborted(make_sequence([]), after_s=0.9)) == (0, 0, 0, 0)
    assert judged(aborted(make_sequence([]), after_s=1.1)) == (0, 1, 0, 0)


def test_who_leaves_in_the_middle_is_judged_by_what_there_was() -> None:
    assert judged(aborted(make_sequence([0.5, 0.7]), after_s=0.71)) == (1, 0, 0, 1)


# --- the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    never_met = SLO(1e-9, 1e-9, rank=0)
    return make_engine(folder, slos={"priority": never_met, DEFAULT_TIER: SLO(1e9, 1e9)})


def test_the_engine_counts_each_request_in_its_tier(engine: Engine) -> None:
    for i, tier in enumerate(["priority", DEFAULT_TIER, DEFAULT_TIER]):
        engine.add(f"r{i}", prompt_of(engine, 5), Sampling(max_tokens=4), tier=tier)
    run(engine, "r0", "r1", "r2")
    assert judged(engine.attainment.tiers["priority"]) == (0, 1, 0, 1)
    assert judged(engine.attainment.tiers[DEFAULT_TIER]) == (2, 0, 2, 0)
    assert engine.attainment.tiers[DEFAULT_TIER].tpot_ms_sum > 0


def test_the_time_before_the_engine_counts(engine: Engine) -> None:
    engine.add("r", prompt_of(engine, 5), Sampling(max_tokens=1), waited_s=30.0)
    run(engine, "r")
    assert engine.attainment.tiers[DEFAULT_TIER].ttft_ms_sum > 30_000


def test_tokens_of_an_earlier_worker_are_not_this_engines(engine: Engine) -> None:
    prompt = prompt_of(engine, 5)
    engine.add("r", prompt, Sampling(max_tokens=4), emitted=[5, 6])
    run(engine, "r")
    assert judged(engine.attainment.tiers[DEFAULT_TIER]) == (0, 0, 1, 0)


def test_an_aborted_request_is_judged_where_it_was_late(engine: Engine) -> None:
    for i, tier in enumerate(["priority", DEFAULT_TIER]):
        engine.add(f"r{i}", prompt_of(engine, 5), Sampling(max_tokens=4), tier=tier)
        engine.abort(f"r{i}")
    assert judged(engine.attainment.tiers["priority"]) == (0, 1, 0, 0)
    assert judged(engine.attainment.tiers[DEFAULT_TIER]) == (0, 0, 0, 0)


def test_a_tier_that_is_not_configured_is_refused_by_its_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"tier 'flex' is none of \['default', 'priority'\]"):
        engine.add("r", prompt_of(engine, 5), Sampling(), tier="flex")


def test_a_config_needs_the_default_tier(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no tier 'default' among"):
        make_config(folder, slos={"priority": SLO(1.0, 1.0)})


def test_a_token_on_its_way_when_a_request_leaves_counts_for_nothing() -> None:
    sequence = make_sequence([0.5, 0.7])
    sequence.expect(ARRIVAL_S + 0.9)
    attainment = Attainment(SLOS)
    attainment.abort(sequence, ARRIVAL_S + 0.8)
    assert attainment.tiers[DEFAULT_TIER].tpot_ms_sum == pytest.approx(200.0)
    waiting = make_sequence([])
    waiting.expect(ARRIVAL_S + 1.0)
    attainment = Attainment(SLOS)
    attainment.abort(waiting, waiting.first_deadline_s + 0.001)
    assert attainment.tiers[DEFAULT_TIER].ttft_missed == 1
