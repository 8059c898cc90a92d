"""The hybrid token scheduler under a virtual clock: who gets which tokens, and when."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.prompt_load import MEMORY_S, PromptLoad
from tests.gpu_worker.virtual import World, make_job, make_latency, make_sequence, make_world

requests = st.lists(
    st.tuples(
        st.integers(0, 400),  # arrives in this iteration
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 20),  # to generate
        st.integers(0, 3),  # who share a prefix
        st.sampled_from([20.0, 60.0, 5000.0]),  # service level
    ),
    max_size=12,
)
job_lists = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.lists(st.integers(2, 40), min_size=1, max_size=6),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=3,
)


def is_finetuning(batch: Batch) -> bool:
    return bool(batch.forwards or batch.steps or batch.updates)


def is_kept(batch: Batch, world: World) -> bool:
    """Finetuning was added within the limit; what inference takes by itself is not the scheduler's to refuse."""
    lanes = [world.scheduler.latency, world.scheduler.lane_latency or world.scheduler.latency]
    alone = max(latency.forward_ms(batch.inference_work) for latency in lanes)
    return batch.predicted_ms <= max(batch.limit_ms, alone) + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    jobs=job_lists,
    num_blocks=st.integers(16, 80),
    budget=st.integers(4, 64),
    slowness=st.lists(st.floats(0.5, 3.0), min_size=1, max_size=7),
    lanes=st.booleans(),
)
def test_everything_finishes_and_no_block_is_lost(
    requests: list[tuple[int, int, int, int, float]],
    jobs: list[tuple[int, list[int], int, bool]],
    num_blocks: int,
    budget: int,
    slowness: list[float],
    lanes: bool,
) -> None:
    turn = iter(range(10**9))
    world = make_world(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        patience=5,
        lane_latency=make_latency(1.5) if lanes else None,
        actual=lambda predicted: predicted * slowness[next(turn) % len(slowness)],
    )
    arrivals: dict[int, list[Callable[[], None]]] = {}
    for i, (at, prompt, output, family, slo) in enumerate(requests):
        sequence = make_sequence(f"r{i}", prompt, output, family, tpot_slo_ms=slo, ttft_slo_ms=slo)
        arrivals.setdefault(at, []).append(lambda s=sequence: world.scheduler.add(s))  # type: ignore[misc]
    for i, (at, lengths, batch_size, evaluate) in enumerate(jobs):
        job = make_job(f"j{i}", lengths, batch_size=batch_size, evaluate=evaluate)
        arrivals.setdefault(at, []).append(lambda j=job: world.scheduler.add_job(j))  # type: ignore[misc]
    for iteration in range(20_000):
        for arrive in arrivals.pop(iteration, []):
            arrive()
        if not arrivals and not world.scheduler.has_work:
            break
        forced = world.scheduler.finetuning.is_starved
        batch = world.step()
        assert forced or is_kept(batch, world)
    assert sorted(world.finished) == sorted(f"r{i}" for i in range(len(requests)))
    assert {f"r{i}": row[2] for i, row in enumerate(requests)} == {
        k: len(v) for k, v in world.outputs.items()
    }
    assert sorted(world.jobs_done) == sorted(f"j{i}" for i in range(len(jobs)))
    assert world.scheduler.blocks.num_free_blocks == num_blocks


# --- inference


def test_requests_are_admitted_in_the_order_of_their_arrival() -> None:
    world = make_world(max_num_seqs=2)
    for i in range(6):
        world.scheduler.add(make_sequence(f"r{i}", 8, 4, i))
    world.run()
    assert world.finished == [f"r{i}" for i in range(6)]


def test_a_prompt_larger_than_an_iteration_is_computed_in_pieces() -> None:
    world = make_world(max_num_batched_tokens=16)
    world.scheduler.add(make_sequence("r", 50, 2))
    sizes = [world.step().chunks[0].num_tokens for _ in range(4)]
    assert sizes == [16, 16, 16, 2]


def test_a_long_prompt_does_not_take_the_tokens_of_those_who_decode() -> None:
    world = make_world(max_num_batched_tokens=16, num_blocks=100)
    long = make_sequence("long", 60, 2, 1)
    short = make_sequence("short", 4, 30, 2)
    world.scheduler.add(short)
    world.step()
    world.scheduler.add(long)
    world.scheduler.running.reverse()  # whatever their ages
    while long.num_uncomputed_tokens > 1:
        assert short in [chunk.sequence for chunk in world.step().chunks]
        world.scheduler.running.sort(key=lambda sequence: sequence.request_id)


def test_being_late_does_not_cut_a_prompt_into_crumbs() -> None:
    world = make_world(max_num_batched_tokens=64)
    world.now_s = 100.0
    world.scheduler.add(make_sequence("late", 50, 2, ttft_slo_ms=10.0))
    assert [chunk.num_tokens for chunk in world.step().chunks] == [50]


def test_a_prompt_is_cut_so_that_those_who_decode_are_in_time() -> None:
    world = make_world(max_num_batched_tokens=64)
    world.scheduler.add(make_sequence("decoding", 4, 30, 1, tpot_slo_ms=7.0))
    world.step()
    world.scheduler.add(make_sequence("arriving", 60, 2, 2))
    batch = world.step()
    assert 32 <= batch.num_inference_tokens < 60
    assert batch.predicted_ms <= 7.0


def test_a_crowd_of_prompts_does_not_make_those_late_who_decode() -> None:
    world = make_world(max_num_batched_tokens=64, num_blocks=200)
    world.scheduler.add(make_sequence("decoding", 4, 50, 1, tpot_slo_ms=8.0))
    world.step()
    for i in range(7):
        world.scheduler.add(make_sequence(f"arriving{i}", 40, 2, 2 + i))
    while world.scheduler.waiting:
        world.step()
    assert fmean(world.gaps_ms["decoding"]) <= 8.0 and max(world.gaps_ms["decoding"]) <= 16.0


def test_prompts_go_on_where_decodes_alone_take_too_long() -> None:
    world = make_world(max_num_batched_tokens=64, max_model_len=128, latency=make_latency(scale=10.0))
    world.scheduler.add(make_sequence("decoding", 4, 50, 1, tpot_slo_ms=5.0))
    world.step()
    world.scheduler.add(make_sequence("arriving", 100, 2, 2))
    assert [chunk.num_tokens for chunk in world.step().chunks] == [32, 1]


def test_the_newest_is_preempted_and_loses_nothing() -> None:
    world = make_world(num_blocks=16, max_num_seqs=4)
    for i in range(4):
        world.scheduler.add(make_sequence(f"r{i}", 8, 20, i))
    world.run()
    assert world.finished[0] == "r0"
    assert all(len(world.outputs[f"r{i}"]) == 20 for i in range(4))


def test_a_preempted_sequence_finds_its_prefix_again() -> None:
    world = make_world(num_blocks=16)
    sequence = make_sequence("r", 30, 4)
    world.scheduler.add(sequence)
    world.step()
    world.scheduler.inference._preempt(Batch(), sequence)
    assert world.scheduler.blocks.num_free_blocks == 16
    assert world.step().chunks[0].start == 28
    assert sequence.num_cached_tokens == 0, "what it computed itself was not found in the cache"


# --- finetuning beside inference


@pytest.mark.parametrize("tpot_ms", [5.0, 10.0, 40.0])
def test_gaps_between_tokens_stay_within_the_service_level(tpot_ms: float) -> None:
    world = make_world(num_blocks=200, patience=1000, min_window=16)
    world.scheduler.add_job(make_job("j", [60, 60, 50], in_flight=64, n_epochs=20))
    for i in range(4):
        world.scheduler.add(make_sequence(f"r{i}", 6, 50, i, tpot_slo_ms=tpot_ms, ttft_slo_ms=500))
    batches = [world.step() for _ in range(60)]
    for gaps in world.gaps_ms.values():
        assert fmean(gaps) <= tpot_ms and max(gaps) <= 2 * tpot_ms
    assert sum(is_finetuning(batch) for batch in batches) > 30


def test_a_looser_service_level_buys_more_finetuning() -> None:
    done = []
    for tpot_ms in (6.0, 12.0, 24.0):
        world = make_world(num_blocks=200)
        world.scheduler.add_job(job := make_job("j", [60], n_epochs=1000))
        world.scheduler.add(make_sequence("r", 6, 50, tpot_slo_ms=tpot_ms))
        for _ in range(50):
            world.step()
        done.append(job.served_tokens / world.now_s)
    assert done[0] < done[1] < done[2]


def test_finetuning_alone_fills_iterations_up_to_the_idle_bound() -> None:
    world = make_world(idle_ms=20.0, finetune_window=64)
    world.scheduler.add_job(make_job("j", [60], num_layers=12, n_epochs=100))
    sizes = [world.step().predicted_ms for _ in range(20)]
    assert max(sizes) <= 19.0 + 1e-6 and sum(sizes) > 15.0 * len(sizes)


def test_a_job_that_never_fits_still_moves() -> None:
    world = make_world(patience=10, latency=make_latency(scale=100.0))
    world.scheduler.add_job(job := make_job("j", [40], n_epochs=100))
    world.scheduler.add(make_sequence("r", 4, 58, tpot_slo_ms=1.0))
    for _ in range(50):
        world.step()
    assert 0 < job.served_tokens < 20 * 16


def test_a_prompt_still_to_be_computed_is_not_made_late_by_finetuning() -> None:
    world = make_world(num_blocks=200, max_num_batched_tokens=16, max_model_len=256)
    world.scheduler.add_job(make_job("j", [60], n_epochs=1000))
    world.scheduler.add(sequence := make_sequence("r", 160, 2, ttft_slo_ms=50.0))
    while sequence.num_output_tokens == 0:
        world.step()
    assert world.now_s < 0.050


def test_after_many_prompts_finetuning_leaves_time_for_the_next() -> None:
    iterations_ms = []
    for num_prompts in (0, 600):
        world = make_world(num_blocks=400)
        for i in range(num_prompts):
            world.scheduler.add(make_sequence(f"p{i}", 60, 1, i))
        world.run()
        world.scheduler.add_job(make_job("j", [60], num_layers=40, n_epochs=1000))
        world.scheduler.add(sequence := make_sequence("r", 6, 50, tpot_slo_ms=50.0, arrival_s=world.now_s))
        while sequence.first_token_s is None:
            world.step()
        batch = world.step()
        assert is_finetuning(batch)
        iterations_ms.append(batch.predicted_ms)
    assert iterations_ms[1] < 0.8 * iterations_ms[0]


def test_the_load_is_the_share_of_time_that_prompts_have_taken_of_late() -> None:
    load = PromptLoad()
    assert load.share(0.0) == 0.0
    for i in range(600):
        load.add(50.0, 0.1 * i)
    share = load.share(60.0)
    assert share == pytest.approx(0.5, abs=0.02)
    assert load.share(60.0 + MEMORY_S) == pytest.approx(share / math.e)
    load.add(1e6, 60.0)
    assert load.share(60.0) == 1.0


@pytest.mark.parametrize(
    ("ttft_slo_ms", "load", "lanes"), [(2000.0, 0.0, {2}), (50.0, 0.0, {1}), (2000.0, 0.6, {1})]
)
def test_prompts_have_one_of_two_lanes_where_they_have_time_and_are_few(
    ttft_slo_ms: float, load: float, lanes: set[int]
) -> None:
    world = make_world(num_blocks=400, max_model_len=256, lane_latency=make_latency(1.8))
    world.scheduler.add_job(make_job("j", [60], n_epochs=1000, num_layers=40))
    for i in range(6):
        world.scheduler.add(make_sequence(f"d{i}", 4, 200, i, tpot_slo_ms=20.0))
    assert any(world.step().num_lanes == 2 for _ in range(40))
    if load:
        world.scheduler._prompt_load.add(1000 * load * MEMORY_S, world.now_s)
    prompts = [
        make_sequence(f"p{i}", 160, 2, 9 + i, arrival_s=world.now_s, ttft_slo_ms=ttft_slo_ms)
        for i in range(2)
    ]
    for prompt in prompts:
        world.scheduler.add(prompt)
    found = set()
    while any(prompt.first_token_s is None for prompt in prompts):
        found.add(world.step().num_lanes)
    assert found == lanes
    assert any(world.step().num_lanes == 2 for _ in range(40))


def test_the_other_lane_trains_as_long_as_requests_compute_in_theirs() -> None:
    world = make_world(num_blocks=400, max_model_len=256, lane_latency=make_latency(1.0))
    world.scheduler.add_job(make_job("j", [60], n_epochs=1000, num_layers=40))
    world.scheduler._prompt_load.add(
        450.0 * MEMORY_S, world.now_s
    )  # nearly half of what is left goes to prompts
    world.scheduler.add(make_sequence("p", 200, 2, arrival_s=world.now_s, ttft_slo_ms=5000.0))
    batch = world.step()
    assert batch.prompts and batch.num_lanes == 2 and batch.limit_ms >= batch.lanes_ms[0]
    assert batch.lanes_ms[1] > 0.8 * batch.lanes_ms[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (2.0, 1.0)])
def test_jobs_share_the_machine_by_their_weights(weights: tuple[float, float]) -> None:
    world = make_world(num_blocks=200, idle_ms=5.0)
    jobs = [make_job(f"j{w}{i}", [60, 50], n_epochs=1000, weight=w) for i, w in enumerate(weights)]
    for job in jobs:
        world.scheduler.add_job(job)
    for _ in range(600):
        world.step()
    done = [job.served_tokens * job.weight for job in jobs]
    assert done[1] / done[0] == pytest.approx(weights[1] / weights[0], rel=0.1)


def test_a_job_that_comes_late_does_not_catch_up_on_what_others_had() -> None:
    world = make_world(num_blocks=200, idle_ms=10.0)
    world.scheduler.add_job(first := make_job("first", [50], n_epochs=1000))
    for _ in range(200):
        world.step()
    world.scheduler.add_job(second := make_job("second", [50], n_epochs=1000))
    before = first.served_tokens
    for _ in range(200):
        world.step()
    assert first.served_tokens - before == pytest.approx(second.served_tokens - before, rel=0.1)


def test_an_evaluation_runs_before_the_first_step_and_after_the_last() -> None:
    world = make_world(num_blocks=40)
    world.scheduler.add_job(job := make_job("j", [20, 20], evaluate=True))
    kinds: list[str] = []
    while world.scheduler.has_work:
        batch = world.step()
        kinds += ["eval" for _ in batch.reports]
        kinds += ["step" for _ in batch.updates]
    assert kinds == ["eval", "step", "step", "eval"]
    assert job.step == 2
