"""A job's way through validation, and the background work around it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from services.adapter_store import background
from services.adapter_store.tasks import delete_object, validate_dataset
from services.adapter_store.validation import validate_job
from shared import jobs
from shared.config import Settings
from shared.db import SessionFactory, now
from shared.files import delete_file, file_key
from shared.messages import DatasetRef, TrainSpec
from shared.model_folder import describe_model
from shared.models import BaseModelRow, BgTask, FtEvent, FtJob, Outbox
from shared.outbox import require_task
from shared.storage import ObjectStore
from tests.records import make_file, make_job, make_tenant


def chat_lines(count: int, answer: str = "Hello") -> bytes:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    return b"\n".join([json.dumps({"messages": messages}).encode()] * count)


async def upload(factory: SessionFactory, store: ObjectStore, content: bytes) -> str:
    async with factory.begin() as session:
        tenant = await make_tenant(session)
        file_id = await make_file(session, tenant, content)
    await store.put(file_key(tenant, file_id), content)
    return file_id


async def create(factory: SessionFactory, **fields: Any) -> str:
    async with factory.begin() as session:
        return (await make_job(session, await make_tenant(session), **fields)).id


async def read_job(factory: SessionFactory, job_id: str) -> FtJob:
    async with factory.begin() as session:
        return await session.get_one(FtJob, job_id)


async def read_task(factory: SessionFactory, ref: str) -> BgTask:
    async with factory.begin() as session:
        return (await session.scalars(select(BgTask).where(BgTask.ref == ref))).one()


async def test_good_files_queue_the_job_with_its_datasets(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    training = await upload(session_factory, object_store, chat_lines(12))
    validation = await upload(session_factory, object_store, chat_lines(1, "Bye"))
    job_id = await create(session_factory, training_file=training, validation_file=validation)
    await validate_dataset(settings, engine, job_id)
    job = await read_job(session_factory, job_id)
    model = describe_model(settings.model_dir)
    assert (job.status, job.base_digest) == ("queued", model.base_digest)
    ref = DatasetRef.model_validate(job.training_data)
    assert ref.num_examples == 12 and await object_store.exists(ref.key)
    assert DatasetRef.model_validate(job.validation_data).num_examples == 1
    assert job.report is not None and job.report["training_file"]["examples"] == 12
    async with session_factory.begin() as session:
        assert list(await session.scalars(select(Outbox.key))) == [job_id]
        base = await session.get_one(BaseModelRow, model.base_digest)
        assert (base.name, base.tokenizer_digest) == ("tiny", model.tokenizer_digest)
    assert (await read_task(session_factory, job_id)).done_at is not None


async def test_a_bad_file_fails_the_job_with_its_lines(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    training = await upload(session_factory, object_store, chat_lines(12) + b"\n{\n[]")
    job_id = await create(session_factory, training_file=training)
    await validate_dataset(settings, engine, job_id)
    job = await read_job(session_factory, job_id)
    assert (job.status, job.error_code, job.error_param) == (
        "failed",
        "invalid_training_file",
        "training_file",
    )
    assert job.error_message is not None
    assert "line 13: not JSON" in job.error_message and "line 14: expected a JSON object" in job.error_message
    async with session_factory.begin() as session:
        query = select(FtEvent).where(FtEvent.job_id == job_id, FtEvent.level == "error")
        event = (await session.scalars(query)).one()
    assert event.data is not None and [each["line"] for each in event.data["errors"]] == [13, 14]


async def test_what_the_job_asks_for_decides(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    few = await upload(session_factory, object_store, chat_lines(9))
    long = await upload(session_factory, object_store, chat_lines(10, "word " * 100))
    good = await upload(session_factory, object_store, chat_lines(10))
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"training_file": few}, "invalid_training_file", "at least 10"),
        (
            {"training_file": long, "spec": TrainSpec(max_seq_len=32)},
            "invalid_training_file",
            "max_seq_len is 32",
        ),
        ({"training_file": good, "validation_file": few, "base_model": "other"}, "model_not_found", "other"),
        (
            {"training_file": good, "validation_file": await upload(session_factory, object_store, b"x")},
            "invalid_validation_file",
            "line 1",
        ),
    ]
    for fields, code, words in cases:
        job_id = await create(session_factory, **fields)
        await validate_dataset(settings, engine, job_id)
        job = await read_job(session_factory, job_id)
        assert (job.status, job.error_code) == ("failed", code)
        assert job.error_message is not None and words in job.error_message
    lenient = settings.model_copy(update={"min_training_examples": 1})
    job_id = await create(session_factory, training_file=few)
    await validate_dataset(lenient, engine, job_id)
    assert (await read_job(session_factory, job_id)).status == "queued"


async def test_a_file_that_is_gone_fails_the_job(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    training = await upload(session_factory, object_store, chat_lines(10))
    job_id = await create(session_factory, training_file=training)
    async with session_factory.begin() as session:
        await delete_file(session, await make_tenant(session), training)
    await validate_dataset(settings, engine, job_id)
    assert (await read_job(session_factory, job_id)).error_code == "file_not_found"


async def test_a_job_cancelled_while_its_files_are_read_stays_cancelled(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings
) -> None:
    training = await upload(session_factory, object_store, chat_lines(10))
    job_id = await create(session_factory, training_file=training)

    class CancellingStore(ObjectStore):
        async def put(self, *args: Any, **kwargs: Any) -> bool:
            async with session_factory.begin() as session:
                await jobs.request_cancel(session, await make_tenant(session), job_id)
            return await object_store.put(*args, **kwargs)

    store = CancellingStore(object_store._store)
    await validate_job(session_factory, store, settings, job_id)
    assert (await read_job(session_factory, job_id)).status == "cancelled"


async def test_validating_twice_at_once_queues_once(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    training = await upload(session_factory, object_store, chat_lines(10))
    job_id = await create(session_factory, training_file=training)
    await asyncio.gather(*(validate_dataset(settings, engine, job_id) for _ in range(4)))
    await validate_dataset(settings, engine, job_id)
    task = await read_task(session_factory, job_id)
    assert (task.tries, task.done_at is None) == (1, False)
    async with session_factory.begin() as session:
        assert len(list(await session.scalars(select(Outbox)))) == 1


async def test_a_task_that_keeps_failing_is_given_up_and_its_job_with_it(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    training = await upload(session_factory, object_store, chat_lines(10))
    job_id = await create(session_factory, training_file=training)
    broken = settings.model_copy(update={"spool_dir": settings.model_dir / "config.json" / "x"})
    for tries in range(1, background.MAX_TRIES + 1):
        assert (await read_job(session_factory, job_id)).status == "validating_files"
        await validate_dataset(broken, engine, job_id)
        task = await read_task(session_factory, job_id)
        assert task.tries == tries and task.error is not None and "NotADirectoryError" in task.error
    job = await read_job(session_factory, job_id)
    assert (job.status, job.error_code) == ("failed", "server_error")
    assert job.error_message is not None and "config.json" not in job.error_message
    assert (await read_task(session_factory, job_id)).done_at is not None


async def test_lost_tasks_are_due_again_once_a_while(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        for ref in ("files/a", "files/b", "files/c"):
            await require_task(session, "delete_object", ref)
        await require_task(session, "delete_object", "files/a")
    assert await background.take_due(session_factory) == [], "the first sending is the caller's"
    async with session_factory.begin() as session:
        overdue = update(BgTask).where(BgTask.ref != "files/c").values(due_at=now() - timedelta(seconds=1))
        await session.execute(overdue)
    assert sorted(await background.take_due(session_factory)) == [
        ("delete_object", "files/a"),
        ("delete_object", "files/b"),
    ]
    assert await background.take_due(session_factory) == []


async def test_a_deleted_files_bytes_go(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings, engine: AsyncEngine
) -> None:
    file_id = await upload(session_factory, object_store, b"x")
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        await delete_file(session, tenant, file_id)
    key = file_key(tenant, file_id)
    await delete_object(settings, engine, "files/without/a-task")
    assert await object_store.exists(key)
    await delete_object(settings, engine, key)
    assert not await object_store.exists(key)


@pytest.fixture
async def other_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    from shared.db import make_engine

    engine = make_engine(settings, pooled=False)
    yield engine
    await engine.dispose()


async def test_a_name_is_held_by_one_process_and_freed_with_its_connection(
    engine: AsyncEngine, other_engine: AsyncEngine
) -> None:
    async with background.exclusive(engine, "sweep") as held:
        async with background.exclusive(other_engine, "sweep") as also:
            assert held and not also
        async with background.exclusive(other_engine, "other") as different:
            assert different
    async with background.exclusive(other_engine, "sweep") as later:
        assert later
