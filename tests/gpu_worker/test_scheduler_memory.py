"""Blocks go to requests first, then to jobs in turn; nobody is forgotten when they are short."""

from __future__ import annotations

import pytest

from services.gpu_worker.engine.pressure import Pressure, PressureGauge
from services.gpu_worker.finetune.job import Phase
from tests.gpu_worker.virtual import make_job, make_latency, make_sequence, make_world


def test_requests_take_the_blocks_of_a_job_which_starts_its_step_again() -> None:
    world = make_world(num_blocks=20, idle_ms=5.0)
    world.scheduler.add_job(job := make_job("j", [60], num_layers=4, n_epochs=2))
    for _ in range(4):
        world.step()
    assert job.blocks
    world.scheduler.add(make_sequence("r", 40, 10))
    world.step()
    assert job.restarts == 1 and not job.blocks and job.position == 0
    world.run()
    assert world.finished == ["r"] and world.jobs_done == ["j"]


def test_a_job_that_waits_for_its_update_loses_its_blocks_but_no_work() -> None:
    world = make_world(num_blocks=20, latency=make_latency(), patience=1000)
    world.scheduler.latency.optimizer_ms = 10_000.0
    world.scheduler.add(make_sequence("first", 4, 12, 1))
    world.scheduler.add_job(job := make_job("j", [60]))
    while job.phase is not Phase.OPTIMIZER:
        world.step()
    world.scheduler.add(make_sequence("second", 40, 4, 2))
    world.step()
    assert not job.blocks and job.restarts == 0 and job.phase is Phase.OPTIMIZER


def test_a_job_as_large_as_the_cache_runs_again_after_it_was_reclaimed() -> None:
    world = make_world(num_blocks=16, idle_ms=5.0)
    world.scheduler.add_job(make_job("j", [64], num_layers=4))
    world.step()
    world.scheduler.add(make_sequence("r", 10, 4))
    world.run()
    assert world.jobs_done == ["j"] and world.finished == ["r"]


def test_jobs_take_turns_where_memory_holds_one_of_them() -> None:
    world = make_world(num_blocks=20, idle_ms=10.0)
    jobs = [make_job(f"j{i}", [60], n_epochs=1000) for i in range(2)]
    for job in jobs:
        world.scheduler.add_job(job)
    for _ in range(300):
        world.step()
    assert min(job.step for job in jobs) > 0.8 * max(job.step for job in jobs) > 0


def test_an_aborted_sequence_and_a_removed_job_leave_nothing_behind() -> None:
    world = make_world(num_blocks=40, idle_ms=5.0)
    sequences = [make_sequence(f"r{i}", 10, 30, i) for i in range(3)]
    for sequence in sequences:
        world.scheduler.add(sequence)
    world.scheduler.add_job(job := make_job("j", [30]))
    for _ in range(3):
        world.step()
    world.scheduler.abort(sequences[1])
    world.scheduler.remove_job(job)
    world.scheduler.blocks.check_integrity()
    world.run()
    assert sorted(world.finished) == ["r0", "r2"]
    assert world.scheduler.blocks.num_free_blocks == 40


# --- keys and values in host memory


def test_a_job_that_can_park_goes_on_where_it_was() -> None:
    world = make_world(num_blocks=20, idle_ms=5.0)
    world.scheduler.add_job(job := make_job("j", [60], num_layers=4))
    job.can_park = True
    forward = backward = 0.0
    parked: list[int] = []
    for number in range(1000):
        if job.reads_cache and not job.parked and not world.scheduler.running and len(parked) < 5:
            world.scheduler.add(make_sequence(f"r{number}", 40, 3, number))
        num_computed = job.num_cached_tokens if job.phase in (Phase.FORWARD, Phase.BACKWARD) else 0
        batch = world.step()
        for item in batch.parked:
            assert len(item.blocks) == -(-num_computed // 4) and not job.blocks
            parked.append(number)
        assert not (job.parked and job.blocks)
        forward += batch.num_tokens(Phase.FORWARD)
        backward += batch.num_tokens(Phase.BACKWARD)
        if world.jobs_done:
            break
    assert len(parked) == 5 and job.restarts == 0
    assert (forward, backward) == pytest.approx((60, 60)), "nothing is computed twice"


def test_blocks_are_taken_from_whoever_loses_no_work_by_it() -> None:
    world = make_world(num_blocks=40, idle_ms=1000.0, patience=1000)
    world.scheduler.latency.optimizer_ms = 1e9
    jobs = [make_job(name, [60]) for name in ("stays", "parks", "waits for its update")]
    for job in jobs:
        job.blocks = world.scheduler.blocks.allocate(12)
        world.scheduler.add_job(job)
    jobs[0].position, jobs[1].position = 32, 32
    jobs[0].served_tokens, jobs[1].can_park, jobs[2].phase = 1e6, True, Phase.OPTIMIZER
    world.scheduler.finetuning.pressure = Pressure.PAUSED  # nobody moves but by giving blocks up
    for first_token, losers in ((1, 1), (2, 2), (3, 3)):
        world.scheduler.add(make_sequence(f"r{first_token}", 48, 60, first_token))
        world.step()
        assert sum(not job.blocks for job in jobs) == losers
        assert bool(jobs[0].blocks) == (losers < 3)
    assert [job.restarts for job in jobs] == [1, 0, 0]


# --- pressure


def test_windows_are_small_and_then_none_while_memory_is_short() -> None:
    world = make_world(num_blocks=64, idle_ms=1000.0, finetune_window=64, min_window=8)
    world.scheduler.add_job(make_job("j", [60], n_epochs=50, num_layers=4))
    largest = []
    for level in Pressure:
        world.scheduler.finetuning.pressure = level
        batches = [world.step() for _ in range(3)]
        sizes = [work.window.num_tokens for batch in batches for work in batch.forwards + batch.steps]
        largest.append(max(sizes, default=0))
    assert largest == [60, 8, 8, 0, 0]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [("ll", 2), ("llllllll", 4), ("lls", 2), ("llh", 1), ("hhh", 0), ("lllllhsh", 2)],
)
def test_pressure_follows_the_free_memory_a_step_at_a_time(readings: str, expected: int) -> None:
    gauge = PressureGauge(low=100, high=200)
    free = {"l": 99, "s": 150, "h": 201}
    assert [gauge.observe(free[reading]) for reading in readings][-1] == expected
