"""The Celery tasks: thin shells around coroutines, each with an event loop and connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

from celery import Celery
from sqlalchemy.ext.asyncio import AsyncEngine

from services.adapter_store import background, dispatch, garbage
from services.adapter_store.validation import validate_job
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.queue import open_async_redis
from shared.storage import ObjectStore

STATEMENT_TIMEOUT_S = 60.0
GARBAGE_EVERY_S = 3600.0


def run(settings: Settings, work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def with_engine() -> None:
        engine = make_engine(settings, statement_timeout_s=STATEMENT_TIMEOUT_S, pooled=False)
        try:
            await work(engine)
        finally:
            await engine.dispose()

    asyncio.run(with_engine())


async def validate_dataset(settings: Settings, engine: AsyncEngine, job_id: str) -> None:
    store = ObjectStore.from_settings(settings)
    await background.run_required(
        engine,
        "validate_dataset",
        job_id,
        lambda: validate_job(session_factory(engine), store, settings, job_id),
    )


async def delete_object(settings: Settings, engine: AsyncEngine, key: str) -> None:
    store = ObjectStore.from_settings(settings)
    await background.run_required(engine, "delete_object", key, lambda: store.delete(key))


async def sweep(settings: Settings, engine: AsyncEngine, app: Celery) -> None:
    """What was lost on its way is sent again; one sweeper at a time."""
    factory = session_factory(engine)
    async with background.exclusive(engine, "sweep") as held:
        if not held:
            return
        for kind, ref in await background.take_due(factory):
            app.send_task(kind, [ref])
        await dispatch.fail_forgotten(factory)
        await garbage.expire_checkpoints(factory, ObjectStore.from_settings(settings), settings)
        async with open_async_redis(settings.redis_url) as client:
            await dispatch.resend_lost(factory, client)


async def collect_garbage(settings: Settings, engine: AsyncEngine) -> None:
    factory = session_factory(engine)
    async with background.exclusive(engine, "collect_garbage") as held:
        if not held:
            return
        await garbage.expire_files(factory)
        await garbage.purge_rows(factory)
        await garbage.remove_orphans(factory, ObjectStore.from_settings(settings), settings)


def register(app: Celery, settings: Settings) -> Celery:
    """Adds the tasks and their schedule to the client that `make_celery` made."""

    def task(name: str, body: Callable[..., Coroutine[Any, Any, None]], *extra: object) -> None:
        def run_task(*args: str) -> None:
            run(settings, lambda engine: body(settings, engine, *extra, *args))

        cast(Any, app.task)(name=name, shared=False)(run_task)

    task("validate_dataset", validate_dataset)
    task("delete_object", delete_object)
    task("sweep", sweep, app)
    task("collect_garbage", collect_garbage)
    app.conf.update(
        beat_scheduler="celery.beat:Scheduler",  # in memory: every task here may run early or twice
        beat_schedule={
            "sweep": {"task": "sweep", "schedule": settings.sweep_s},
            "collect_garbage": {"task": "collect_garbage", "schedule": GARBAGE_EVERY_S},
        },
    )
    return app
