"""What an operator and a health probe learn of the workers."""

from __future__ import annotations

import time

from services.status import find_workers, is_on, progress_problem, worker_line, worker_problem
from shared.config import Settings
from shared.messages import WorkerStatus
from shared.queue import InferenceWorkerQueue, open_redis


def make_status(worker_id: str = "gpu-node-7-abcdef", **changes: object) -> WorkerStatus:
    return WorkerStatus.model_validate(
        {"worker_id": worker_id, "model": "tiny", "total_blocks": 10} | changes
    )


def report(settings: Settings, status: WorkerStatus) -> None:
    with open_redis(settings.redis_url) as client:
        InferenceWorkerQueue(client, settings, status.worker_id).beat([], status)


def test_a_worker_that_reported_is_found_on_its_host_only(settings: Settings) -> None:
    assert worker_problem(settings) == "no worker has reported yet"
    report(settings, make_status())
    assert [worker.worker_id for worker in find_workers(settings)] == ["gpu-node-7-abcdef"]
    assert worker_problem(settings, host="gpu-node-7") is None
    assert worker_problem(settings, host="gpu-node") == "no worker has reported yet"


def test_the_last_report_of_a_worker_that_died_does_not_make_the_next_one_ready(settings: Settings) -> None:
    """Nor does one that is left over from before and still reports."""
    report(settings, make_status("gpu-node-7-dead00", uptime_s=100.0))
    assert worker_problem(settings, "gpu-node-7", started_within_s=20.0) == "no worker has reported yet"
    report(settings, make_status("gpu-node-7-abcdef", uptime_s=5.0))
    assert worker_problem(settings, "gpu-node-7", started_within_s=20.0) is None


def test_a_worker_grows_older_after_its_report(settings: Settings) -> None:
    report(settings, make_status(uptime_s=0.0))
    time.sleep(0.05)
    assert worker_problem(settings, started_within_s=0.01) == "no worker has reported yet"
    assert worker_problem(settings, started_within_s=60.0) is None


def test_a_worker_without_progress_is_a_problem_unless_another_works(settings: Settings) -> None:
    report(settings, make_status(progress_age_s=45.0))
    assert str(worker_problem(settings)).startswith("no step finished for 4")
    report(settings, make_status("other-123456"))
    assert worker_problem(settings) is None


def test_redis_that_does_not_answer_is_a_problem_and_no_crash() -> None:
    nowhere = Settings(redis_url="redis://127.0.0.1:9/0")
    assert str(worker_problem(nowhere)).startswith("Redis does not answer")


def test_a_line_tells_state_load_and_cache_of_a_worker() -> None:
    line = worker_line(make_status(running=3, free_blocks=4, progress_age_s=60, training_jobs=("ftjob-1",)))
    assert "stalled: 3 running, 0 waiting, 6/10 cache blocks" in line
    assert "1 jobs" in line
    assert "draining" in worker_line(make_status(draining=True))


def test_the_host_is_everything_before_the_last_part_of_the_id() -> None:
    assert is_on(make_status("a-b-c-0123"), "a-b-c")
    assert progress_problem([]) == "no worker has reported yet"
