"""What a worker's settings mean for its engine."""

from __future__ import annotations

from typing import Literal

import pytest

from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.worker import engine_config
from shared.config import Settings


def test_every_tier_has_its_targets_and_the_stricter_goes_before() -> None:
    config = engine_config(Settings(tpot_slo_ms=30, ttft_slo_ms=900, tpot_slo_priority_ms=25))
    assert config.slos == {
        "priority": SLO(tpot_ms=25, ttft_ms=300, rank=0),
        "default": SLO(tpot_ms=30, ttft_ms=900, rank=1),
        "flex": SLO(tpot_ms=240, ttft_ms=7200, rank=2),
    }


@pytest.mark.parametrize(("priority_ms", "idle_ms"), [(2000, 500), (1000, 500), (600, 300), (0, 1000 / 3)])
def test_an_iteration_beside_nobody_leaves_an_arrival_of_any_tier_time_for_its_prompt(
    priority_ms: float, idle_ms: float
) -> None:
    settings = Settings(ttft_slo_ms=2000, ttft_slo_priority_ms=priority_ms)
    assert engine_config(settings).scheduler.idle_ms == pytest.approx(idle_ms)


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_the_stream_of_the_backward_is_the_settings_choice(choice: Literal["auto", "on", "off"]) -> None:
    assert engine_config(Settings(backward_stream=choice)).backward_stream == choice
