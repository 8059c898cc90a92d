"""The tasks in a real Celery worker against a real broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from celery.contrib.testing.worker import start_worker
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from services.adapter_store.tasks import register
from shared.celery import TaskSender, make_celery
from shared.config import Settings, child_environment
from shared.db import SessionFactory, now
from shared.files import file_key
from shared.models import BgTask
from shared.storage import ObjectStore
from tests.records import make_file, make_job, make_tenant

LINE = json.dumps(
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
)
TIMEOUT_S = 60.0


@pytest.fixture
def database(settings: Settings) -> Iterator[Engine]:
    engine = create_engine(settings.database_url, connect_args={"options": "-c app.tenant=*"})
    yield engine
    engine.dispose()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def status_of(database: Engine, job_id: str) -> str:
    with database.connect() as connection:
        query = text("SELECT status FROM ft_job WHERE id = :id")
        return str(connection.execute(query, {"id": job_id}).scalar_one())


async def make_job_with_file(factory: SessionFactory, store: ObjectStore) -> str:
    content = "\n".join([LINE] * 10).encode()
    async with factory.begin() as session:
        tenant = await make_tenant(session)
        file_id = await make_file(session, tenant, content)
        job = await make_job(session, tenant, training_file=file_id)
    await store.put(file_key(tenant, file_id), content)
    return job.id


async def test_a_worker_validates_what_is_sent_and_sweeps_what_was_lost(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, database: Engine
) -> None:
    sent = await make_job_with_file(session_factory, object_store)
    lost = await make_job_with_file(session_factory, object_store)
    sender = TaskSender(settings)
    assert await sender.send("validate_dataset", sent)
    app = register(make_celery(settings), settings)
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        wait_for(lambda: status_of(database, sent) == "queued")
        assert status_of(database, lost) == "validating_files"
        async with session_factory.begin() as session:
            await session.execute(
                BgTask.__table__.update().values(due_at=now() - timedelta(seconds=1))  # type: ignore[attr-defined]
            )
        app.send_task("sweep")
        wait_for(lambda: status_of(database, lost) == "queued")
    sender.close()


async def test_without_a_broker_sending_says_so_at_once(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"celery_broker_url": "redis+socket:///nonexistent/redis.sock"})
    sender = TaskSender(nowhere)
    assert not await sender.send("validate_dataset", "ftjob-x")
    sender.close()


def start_process(settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "celery", "--app", "services.adapter_store.celery", "worker"]
    argv += ["--beat", "--concurrency", "1", "--loglevel", "info"]
    environment = {**child_environment(settings), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(argv, env=environment, stdout=output, stderr=output, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def test_work_outlives_a_killed_worker_and_a_lost_message(
    session_factory: SessionFactory,
    object_store: ObjectStore,
    settings: Settings,
    database: Engine,
    tmp_path: Path,
) -> None:
    """The sweeper of the next worker sends it again."""
    quick = settings.model_copy(update={"sweep_s": 0.5})
    job_id = await make_job_with_file(session_factory, object_store)
    broker = redis.Redis.from_url(settings.redis_url.replace("db=0", "db=1"))
    first = start_process(quick, tmp_path / "log")
    try:
        wait_for(lambda: bool(broker.exists("_kombu.binding.flexllm")))
    finally:
        kill(first)
    sender = TaskSender(settings)
    await sender.send("validate_dataset", job_id)
    sender.close()
    broker.flushdb()
    async with session_factory.begin() as session:
        await session.execute(text("UPDATE bg_task SET due_at = clock_timestamp()"))
    second = start_process(quick, tmp_path / "log")
    try:
        wait_for(lambda: status_of(database, job_id) == "queued")
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(30)
    assert second.returncode == 0, (tmp_path / "log").read_text()[-3000:]
