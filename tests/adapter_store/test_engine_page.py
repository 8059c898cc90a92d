"""The engine's page: what a worker sent, read and summed up by the store."""

from __future__ import annotations

import pytest

from services.adapter_store.admin.fleet import Fleet
from services.adapter_store.admin.iterations import KINDS, NUM_SLOTS, SLOT_S, figures, quantile, slots
from services.adapter_store.admin.views.engine import choose
from shared.config import Settings
from shared.messages import TierAttainment, WorkerStatus
from shared.queue import (
    InferenceWorkerQueue,
    IterationBatch,
    Iterations,
    IterationSender,
    open_redis,
)
from tests.adapter_store.console_client import Operator

NOW_S = 1_000_000.2


def make_iterations(*batches: tuple[float, IterationBatch]) -> Iterations:
    """Of batches that arrived so many seconds ago."""
    found = Iterations(NOW_S)
    for ago_s, batch in batches:
        found.add(NOW_S - ago_s, batch)
    return found


def report(settings: Settings, *batches: IterationBatch, **status: object) -> None:
    """What a worker does at a beat."""
    values = {"worker_id": "w", "model": "tiny", "free_blocks": 60, "total_blocks": 100} | status
    with open_redis(settings.redis_url) as client:
        worker = WorkerStatus.model_validate(values)
        InferenceWorkerQueue(client, settings, worker.worker_id).beat([], worker)
        for batch in batches:
            IterationSender(client, worker.worker_id).send(batch)


def co_served(num: int = 10) -> IterationBatch:
    """Ten iterations a second: decodes, a prompt, and a job's window on its way there and back."""
    return IterationBatch(
        age_ms=tuple(100.0 * i for i in reversed(range(num))),
        decode_tokens=(8,) * num,
        prefill_tokens=(16,) * num,
        forward_tokens=(24,) * num,
        backward_tokens=(16.0,) * num,
        limit_ms=(120.0,) * num,
        predicted_ms=(80.0,) * num,
        forward_ms=(40.0,) * num,
        steps_ms=(50.0,) * num,
        optimizer_ms=(10.0,) * num,
        finetuning_ms=(80.0,) * num,
        running=(8,) * num,
        waiting=(1,) * num,
        free_blocks=(25,) * num,
        jobs=(2,) * num,
    )


def test_a_slot_holds_the_means_of_the_iterations_that_ended_in_it() -> None:
    columns = slots(make_iterations((0.0, co_served())), total_blocks=100)
    assert {len(column) for column in columns.values()} == {NUM_SLOTS}
    newest = {name: column[-1] for name, column in columns.items()}
    assert newest == {
        "at": 1_000_000.25,
        **{"decode": 8, "prefill": 16, "forward": 24, "backward": 16},
        **{"ms": 100, "predicted_ms": 80, "limit_ms": 120},
        "tokens_share": 0.625,  # 40 of 64
        "time_share": 0.8,  # 80 of 100 ms
        **{"running": 8, "waiting": 1, "kv": 0.75},
    }
    assert columns["decode"][: NUM_SLOTS - 4] == [None] * (NUM_SLOTS - 4)


def test_a_long_iteration_fills_the_time_that_it_took_and_idle_time_stays_empty() -> None:
    batch = IterationBatch(age_ms=(0.0,), decode_tokens=(4,), forward_ms=(2000.0,))
    columns = slots(make_iterations((10.0, batch)), total_blocks=0)
    filled = [i for i, value in enumerate(columns["decode"]) if value is not None]
    assert len(filled) == 5 and filled == list(
        range(filled[0], filled[0] + 5)
    )  # with the slot that it ended in
    assert columns["kv"][filled[0]] is None  # nobody says how many blocks there are


def test_slots_stay_where_they_are_from_one_reading_to_the_next() -> None:
    first, second = make_iterations((0.0, co_served())), make_iterations((0.0, co_served()))
    second.now_s += 3 * SLOT_S
    before, after = slots(first, 100), slots(second, 100)
    assert before["at"][3:] == after["at"][:-3] and before["decode"][3:] == after["decode"][:-3]


def test_rates_are_of_the_five_seconds_before_the_last_batch_and_the_rest_of_the_minute() -> None:
    numbers = figures(make_iterations((7.0, co_served(50)), (0.4, co_served(50))))
    assert [numbers[kind] for kind in KINDS] == ["80", "160", "240", "160"]
    assert (numbers["iterations"], numbers["p50"], numbers["p99"]) == ("10", "100", "100")
    assert numbers["exceeded"] == "100 %"
    assert (numbers["tokens_share"], numbers["time_share"], numbers["jobs"]) == ("62 %", "80 %", "2")


def test_a_worker_that_went_quiet_has_no_speed_but_a_past() -> None:
    numbers = figures(make_iterations((20.0, co_served())))
    assert [numbers[kind] for kind in KINDS] == ["0"] * 4 and numbers["iterations"] == "0"
    assert numbers["p50"] == "100"


def test_without_iterations_nothing_is_claimed() -> None:
    numbers = figures(make_iterations())
    assert numbers["p50"] == numbers["p99"] == numbers["exceeded"] == numbers["time_share"] == "–"
    columns = slots(make_iterations(), 100)
    assert set(columns["decode"]) == set(columns["kv"]) == {None}


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([], 0.5, None), ([7.0], 0.99, 7.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), (list(range(1, 101)), 0.99, 99)],
)
def test_a_quantile_is_a_value_that_occurred(values: list[float], q: float, expected: float | None) -> None:
    assert quantile(values, q) == expected


def test_of_several_workers_one_that_speaks_is_shown_unless_another_was_asked_for() -> None:
    old, new = (WorkerStatus(worker_id=each, progress_age_s=age) for each, age in (("a", 20.0), ("b", 0.5)))
    fleet = Fleet((old, new))
    assert choose(fleet, "") == new and choose(fleet, "a") == old and choose(fleet, "c") is None
    assert choose(Fleet((old,)), "") == old and choose(Fleet(()), "") is None


async def test_what_a_worker_sent_is_on_the_page(operator: Operator, settings: Settings) -> None:
    report(
        settings,
        co_served(),
        memory_bytes={"weights": 3 << 30, "activations": 512 << 20},
        memory_limit_bytes=8 << 30,
        training_jobs=("ftjob-1234567890abcdef",),
        latency_error_p50=0.07,
        latency_error_p95=0.31,
        service_levels={
            "priority": TierAttainment(
                ttft_slo_ms=700, tpot_slo_ms=50, ttft_met=3, ttft_missed=1, ttft_ms_sum=1000, tpot_met=3
            )
        },
    )
    text = await operator.read("/engine")
    for words in (
        "Healthy",
        "tiny",
        "ftjob-12345678",
        "priority",
        "75.0 %",
        "250",
        "of 4",
        "3.0 GiB",
        "Activations",
    ):
        assert words in text, words
    now = (await operator.get("/engine.json")).json()
    assert now["worker"] == "w"
    assert now["figures"]["decode"] == "16" and now["figures"]["p99"] == "100"
    assert (now["figures"]["error"], now["figures"]["error_p95"]) == ("7 %", "31 %")
    assert [value for value in now["slots"]["backward"] if value is not None][-1] == 16
    assert [value for value in now["slots"]["kv"] if value is not None][-1] == 0.75


async def test_a_worker_without_iterations_or_service_levels_shows_neither(
    operator: Operator, settings: Settings
) -> None:
    report(settings)
    text = await operator.read("/engine")
    assert "Healthy" in text and "Service levels" not in text and "Memory" not in text
    now = (await operator.get("/engine.json")).json()
    assert set(now["slots"]["decode"]) == {None} and now["figures"]["decode"] == "0"
    assert "error" not in now["figures"]


async def test_the_page_says_that_no_worker_reports(operator: Operator) -> None:
    assert "No worker reports" in await operator.read("/engine")
    assert set((await operator.get("/engine.json")).json()["slots"]["decode"]) == {None}


async def test_a_worker_is_chosen_by_name_and_what_one_told_outlives_it(
    operator: Operator, settings: Settings
) -> None:
    report(settings, co_served(), worker_id="worker-a")
    report(settings, worker_id="worker-b")
    with open_redis(settings.redis_url) as client:
        IterationSender(client, "worker-gone").send(co_served())
    text = await operator.read("/engine?worker=worker-b")
    assert (
        '<option value="worker-b" selected>' in text
        and 'data-iterations="/admin/engine.json?worker=worker-b"' in text
    )
    text = await operator.read("/engine?worker=worker-gone")
    assert "does not report any more" in text
    now = (await operator.get("/engine.json?worker=worker-gone")).json()
    assert now["worker"] == "worker-gone" and now["figures"]["p50"] == "100"


async def test_a_name_from_outside_is_shown_as_text(operator: Operator) -> None:
    text = await operator.read("/engine?worker=%3Cscript%3Ealert(1)%3C/script%3E")
    assert "<script>alert" not in text
    assert (await operator.get(f"/engine?worker={'x' * 200}")).status_code == 400


async def test_nobody_who_is_not_signed_in_sees_it(client: object, operator: Operator) -> None:
    operator.client.cookies.clear()
    for path in ("/engine", "/engine.json"):
        answer = await operator.get(path)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/admin/login")
    assert (await operator.get("/engine.json", **{"hx-request": "true"})).status_code == 401
