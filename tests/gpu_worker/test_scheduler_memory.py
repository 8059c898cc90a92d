"""Blocks go to requests first, then to jobs in turn; nobody is forgotten when they are short."""

from __future__ import annotations

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
