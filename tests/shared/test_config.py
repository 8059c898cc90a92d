"""Settings that depend on each other."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from shared.config import Settings, child_environment


def test_the_other_tiers_follow_the_default_one() -> None:
    levels = Settings(tpot_slo_ms=30, ttft_slo_ms=900).service_levels
    assert list(levels) == ["priority", "default", "flex"]
    assert [level.tpot_ms for level in levels.values()] == [10, 30, 240]
    assert [level.ttft_ms for level in levels.values()] == [300, 900, 7200]


def test_each_tier_has_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TPOT_SLO_PRIORITY": 20, "TTFT_SLO_PRIORITY": 400, "TPOT_SLO_FLEX": 5e3}.items():
        monkeypatch.setenv(f"FLEXLLM_{name}_MS", str(value))
    levels = Settings().service_levels
    assert levels["priority"] == (20, 400)
    assert levels["default"] == (150, 2000)
    assert levels["flex"] == (5000, 16_000)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tpot_slo_priority_ms": 151}, "TPOT target of priority, 151 ms, exceeds that of default, 150 ms"),
        ({"ttft_slo_priority_ms": 2001}, "TTFT target of priority, 2001 ms, exceeds that of default, 2000"),
        ({"tpot_slo_flex_ms": 149}, "TPOT target of default, 150 ms, exceeds that of flex, 149 ms"),
        ({"ttft_slo_flex_ms": 1}, "set FLEXLLM_TTFT_SLO_* so that priority <= default <= flex"),
    ],
)
def test_a_stricter_tier_with_a_looser_target_is_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_target_is_a_positive_number(value: float) -> None:
    with pytest.raises(ValidationError, match="tpot_slo_ms"):
        Settings(tpot_slo_ms=value)


def test_equal_tiers_are_allowed_and_a_child_process_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{target}_slo{tier}_ms" for target in ("tpot", "ttft") for tier in ("", "_priority", "_flex")]
    settings = Settings(**dict.fromkeys(names, 70.0))
    assert {(level.tpot_ms, level.ttft_ms) for level in settings.service_levels.values()} == {(70, 70)}
    for name, value in child_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings().service_levels == settings.service_levels
