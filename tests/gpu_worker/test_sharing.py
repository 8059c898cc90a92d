"""Who gets the iterations: tenants among each other, requests of different tiers, requests and jobs."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.fair_share import FairShare
from services.gpu_worker.engine.sharing import DynamicTemporal, Temporal, Turn
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.finetune.job import FinetuneJob, Phase
from tests.gpu_worker.virtual import World, make_job, make_latency, make_sequence, make_world

FLEX = SLO(tpot_ms=200.0, ttft_ms=4000.0, rank=2)
DEFAULT = SLO(tpot_ms=20.0, ttft_ms=2000.0, rank=1)
PRIORITY = SLO(tpot_ms=10.0, ttft_ms=500.0, rank=0)


# --- tenants


@pytest.mark.parametrize("seed", range(5))
def test_turns_are_worth_their_weights_whatever_is_taken_in_them(seed: int) -> None:
    rng = random.Random(seed)
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    shares, got = FairShare(quantum=100), dict.fromkeys(weights, 0.0)
    for _ in range(5000):
        first, *others = shares.order(weights)
        served = {first: rng.uniform(1, 150)}
        if rng.random() < 0.3:  # what the first leaves
            served[rng.choice(others)] = rng.uniform(1, 40)
        for key, tokens in served.items():
            shares.charge(key, tokens)
            got[key] += tokens
    total = sum(got.values())
    for key, weight in weights.items():
        assert got[key] / total == pytest.approx(weight / sum(weights.values()), rel=0.05)


def test_nobody_saves_up_turns_in_which_he_was_not_there() -> None:
    shares = FairShare(quantum=10)
    for _ in range(50):
        (key,) = shares.order({"a": 1.0})
        shares.charge(key, 5)
    first = [shares.order({"a": 1.0, "b": 1.0})[0]]
    for _ in range(20):
        shares.charge(first[-1], 10)
        first.append(shares.order({"a": 1.0, "b": 1.0})[0])
    assert abs(first.count("a") - first.count("b")) <= 1


def test_a_turn_that_cannot_be_used_is_lost() -> None:
    shares = FairShare(quantum=10)
    weights = {"blocked": 1.0, "b": 1.0, "c": 1.0}
    got = dict.fromkeys(weights, 0)
    for _ in range(300):
        order = shares.order(weights)
        user = next(key for key in order if key != "blocked")
        shares.charge(user, 5)
        got[user] += 5
        if order[0] == "blocked":
            shares.end_turn()
    assert got["b"] == pytest.approx(got["c"], rel=0.05)


def trained(world: World, jobs: list[FinetuneJob], steps: int) -> list[float]:
    """Token-layers of each job."""
    for job in jobs:
        world.scheduler.add_job(job)
    for _ in range(steps):
        world.step()
    return [job.served_tokens * job.weight for job in jobs]


def test_a_tenant_with_many_jobs_gets_no_more_than_one_with_a_single_job() -> None:
    world = make_world(num_blocks=400, idle_ms=8.0)
    long = {"in_flight": 300, "n_epochs": 10_000}
    jobs = [make_job(f"a{i}", [260, 250], tenant="a", **long) for i in range(3)]
    jobs.append(make_job("b", [260, 250], tenant="b", **long))
    *many, single = trained(world, jobs, 3000)
    assert sum(many) == pytest.approx(single, rel=0.05)
    assert max(many) == pytest.approx(min(many), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_tenants_get_their_weights_beside_requests(seed: int) -> None:
    rng = random.Random(seed)
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    world = make_world(num_blocks=600, idle_ms=20.0, finetune_window=256)
    jobs = [
        make_job(
            tenant,
            [rng.randint(200, 600) for _ in range(9)],
            in_flight=600,
            num_layers=3,
            n_epochs=10_000,
            weight=weight,
            tenant=tenant,
        )
        for tenant, weight in weights.items()
    ]
    for job in jobs:
        world.scheduler.add_job(job)
    for i in range(3000):
        if rng.random() < 0.05:
            world.scheduler.add(
                make_sequence(f"r{i}", rng.randint(1, 30), 20, i, slo=DEFAULT, arrival_s=world.now_s)
            )
        world.step()
    got = [job.served_tokens for job in jobs]  # by weight already
    assert max(got) / min(got) < 1.05


# --- tiers


def test_those_who_pay_for_it_are_first_in_the_queue() -> None:
    world = make_world(max_num_seqs=1)
    for name, slo in (("running", DEFAULT), ("flex", FLEX), ("default", DEFAULT), ("priority", PRIORITY)):
        world.scheduler.add(make_sequence(name, 8, 3, ord(name[0]), slo=slo))
        if name == "running":
            world.step()
    world.run()
    assert world.finished == ["running", "priority", "default", "flex"]


def test_a_flexible_request_gives_its_place_away_and_ends_later_with_all_its_tokens() -> None:
    world = make_world(max_num_seqs=2, num_blocks=100)
    for i in range(2):
        world.scheduler.add(make_sequence(f"flex{i}", 8, 30, i, slo=FLEX))
    world.step()
    world.scheduler.add(make_sequence("default", 8, 5, 9, slo=DEFAULT))
    world.step()
    assert "default" in {s.request_id for s in world.scheduler.running}
    world.run()
    assert world.finished[0] == "default"
    assert {len(tokens) for name, tokens in world.outputs.items() if name != "default"} == {30}


def test_a_default_request_does_not_lose_its_place_to_a_prior_one() -> None:
    world = make_world(max_num_seqs=1)
    world.scheduler.add(make_sequence("default", 8, 10, 1, slo=DEFAULT))
    world.step()
    world.scheduler.add(make_sequence("priority", 8, 2, 2, slo=PRIORITY))
    world.run()
    assert world.finished == ["default", "priority"]


def test_flexible_decodes_wait_where_they_would_make_others_late_but_not_for_ever() -> None:
    latency = make_latency(5.0)
    tight = SLO(tpot_ms=14.0, ttft_ms=1000.0, rank=1)
    world = make_world(num_blocks=400, max_num_seqs=16, latency=latency)
    for i in range(8):
        world.scheduler.add(make_sequence(f"flex{i}", 4, 40, i, slo=FLEX))
    for _ in range(3):
        world.step()
    world.scheduler.add(make_sequence("tight", 4, 40, 20, slo=tight))
    while "tight" not in world.finished:
        world.step()
    assert fmean(world.gaps_ms["tight"]) <= 14.0 and max(world.gaps_ms["tight"]) <= 28.0
    flexible = [gap for name, gaps in world.gaps_ms.items() if name != "tight" for gap in gaps]
    assert 28.0 < max(flexible) <= 2 * FLEX.tpot_ms
    world.run()
    assert all(len(tokens) == 40 for tokens in world.outputs.values())


def test_flexible_requests_alone_have_nobody_to_wait_for() -> None:
    world = make_world(latency=make_latency(10.0), idle_ms=1.0)
    for i in range(3):
        world.scheduler.add(make_sequence(f"f{i}", 4, 20, i, slo=FLEX))
    world.run(max_steps=30)
    assert len(world.finished) == 3


def test_finetuning_keeps_its_floor_beside_flexible_requests() -> None:
    world = make_world(num_blocks=200, latency=make_latency(100.0), patience=5)
    world.scheduler.add_job(job := make_job("j", [40], n_epochs=100))
    for i in range(4):
        world.scheduler.add(make_sequence(f"f{i}", 4, 50, i, slo=SLO(1.0, 1.0, rank=2)))
    for _ in range(30):
        world.step()
    assert job.served_tokens > 0


# --- requests and jobs


def kinds(batches: list[Batch]) -> str:
    """i: inference alone, f: finetuning alone, b: both."""
    found = {(True, False): "i", (False, True): "f", (True, True): "b", (False, False): "-"}
    return "".join(found[bool(batch.decodes or batch.prompts), batch.has_finetuning] for batch in batches)


def shared(sharing: str, steps: int = 40, **config: object) -> list[Batch]:
    world = make_world(num_blocks=200, sharing=sharing, **config)
    world.scheduler.add_job(make_job("j", [60, 40], n_epochs=1000))
    world.scheduler.add(make_sequence("r", 4, 60, slo=SLO(100.0, 1000.0)))
    return [world.step() for _ in range(steps)]


def test_each_policy_gives_iterations_to_those_it_is_named_for() -> None:
    assert kinds(shared("coserve")).count("b") > 30
    assert kinds(shared("inference-only")) == "i" * 40
    assert kinds(shared("finetune-only")) == "f" * 40
    assert kinds(shared("temporal", period=7)) == ("i" * 7 + "f") * 5


def test_a_finetuning_iteration_of_temporal_sharing_is_a_whole_training_sequence() -> None:
    (batch, *_) = [batch for batch in shared("temporal", period=3) if batch.has_finetuning]
    windows = [work.window for work in batch.forwards + batch.steps]
    assert {(window.start, window.end) for window in windows} == {(0, 60)}
    assert [window.layer for window in windows if window.phase is Phase.BACKWARD] == [1, 0]
    assert batch.num_tokens(Phase.FORWARD) == batch.num_tokens(Phase.BACKWARD) == 60
    assert len(batch.updates) == 1 and batch.predicted_ms > 15


def test_without_requests_or_jobs_temporal_sharing_wastes_no_iteration() -> None:
    temporal = Temporal(period=3)
    assert {temporal.turn(False, True, False) for _ in range(10)} == {Turn.FINETUNING}
    assert {temporal.turn(True, False, False) for _ in range(10)} == {Turn.INFERENCE}


def test_the_dynamic_period_grows_while_requests_are_late_and_shrinks_when_they_are_not() -> None:
    dynamic = DynamicTemporal(period=16)
    for _ in range(2000):
        dynamic.turn(True, True, is_late=True)
    assert dynamic.period > 100
    for _ in range(10_000):
        dynamic.turn(True, True, is_late=False)
    assert dynamic.period == 1


@pytest.mark.parametrize("window", [1, 5, 32, 40, 1000])
def test_windows_lie_on_a_grid_and_no_window_is_too_small_for_it(window: int) -> None:
    world = make_world(num_blocks=200, finetune_window=window)
    world.scheduler.add_job(job := make_job("j", [61], n_epochs=2))
    ends = set()
    while world.scheduler.has_work:
        batch = world.step()
        ends |= {work.window.end for work in batch.forwards}
        ends |= {edge for work in batch.steps for edge in (work.window.start, work.window.end)}
    assert job.step == 2
    assert all(end % min(32, window) == 0 for end in ends - {61})


def test_an_update_that_does_not_fit_is_cut() -> None:
    latency = make_latency()
    latency.optimizer_ms = 40.0
    world = make_world(num_blocks=200, latency=latency, patience=1000)
    world.scheduler.add_job(job := make_job("j", [20], n_epochs=1000))
    job.num_update_parts = 16
    world.scheduler.add(make_sequence("r", 4, 58, slo=SLO(15.0, 1000.0)))
    batches = [world.step() for _ in range(57)]
    assert job.step > 2
    cut = [update for batch in batches for update in batch.updates]
    assert [update.start for update in cut[1:]] == [update.end % 16 for update in cut[:-1]]
    assert fmean(world.gaps_ms["r"]) <= 15.0 and max(world.gaps_ms["r"]) <= 30.0
