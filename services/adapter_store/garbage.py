"""Removes what nothing names any more: expired files, superseded checkpoints, objects without a row.

Mark and sweep: an object goes only when it is old and no row speaks for it, so that what is just being
written is safe. Never by prefix.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from shared.config import Settings
from shared.db import SessionFactory, now
from shared.jobs import IDEMPOTENCY_KEPT
from shared.models import (
    TERMINAL_STATUSES,
    AdapterVersion,
    BgTask,
    Checkpoint,
    File,
    FtJob,
    Idempotency,
)
from shared.outbox import require_task
from shared.storage import ObjectStore

BATCH = 500
TASKS_KEPT = timedelta(days=7)
log = structlog.get_logger()


async def expire_files(factory: SessionFactory) -> int:
    """Files past their date are deleted as if their owner had done it."""
    async with factory.begin() as session:
        query = select(File).where(File.expires_at <= now(), File.deleted_at.is_(None)).limit(BATCH)
        files = list(await session.scalars(query.with_for_update(skip_locked=True)))
        for file in files:
            file.deleted_at = now()
            await require_task(session, "delete_object", file.storage_key)
    return len(files)


async def expire_checkpoints(factory: SessionFactory, store: ObjectStore, settings: Settings) -> int:
    """All of a job that is over, and all but the newest of one that is not."""
    age = func.row_number().over(partition_by=Checkpoint.job_id, order_by=Checkpoint.seq.desc())
    ranked = (
        select(Checkpoint.id, age.label("age"), FtJob.status.label("status"))
        .join(FtJob, FtJob.id == Checkpoint.job_id)
        .where(Checkpoint.expired_at.is_(None))
        .subquery()
    )
    superseded = select(ranked.c.id).where(
        or_(ranked.c.age > settings.checkpoints_kept, ranked.c.status.in_(TERMINAL_STATUSES))
    )
    statement = update(Checkpoint).where(Checkpoint.id.in_(superseded.limit(BATCH))).values(expired_at=now())
    async with factory.begin() as session:
        manifests = list(await session.scalars(statement.returning(Checkpoint.manifest_key)))
    for manifest in manifests:
        async for found in store.list(folder_of(manifest)):
            await store.delete(found.key)
    return len(manifests)


async def purge_rows(factory: SessionFactory) -> None:
    async with factory.begin() as session:
        await session.execute(delete(Idempotency).where(Idempotency.created_at < now() - IDEMPOTENCY_KEPT))
        await session.execute(delete(BgTask).where(BgTask.done_at < now() - TASKS_KEPT))


async def remove_orphans(factory: SessionFactory, store: ObjectStore, settings: Settings) -> list[str]:
    """Keys of the objects that were removed."""
    removed: list[str] = []
    for prefix, find_alive in ALIVE.items():
        async for keys in old_keys(store, prefix, settings.objects_kept_s):
            async with factory.begin() as session:
                alive = await find_alive(session, keys)
            for key in keys:
                if key not in alive:
                    await store.delete(key)
                    removed.append(key)
    if removed:
        log.info("orphans_removed", count=len(removed))
    return removed


async def old_keys(store: ObjectStore, prefix: str, kept_s: float) -> AsyncIterator[list[str]]:
    """Batches of keys that were written more than `kept_s` ago."""
    before = datetime.now(UTC) - timedelta(seconds=kept_s)
    batch: list[str] = []
    async for found in store.list(prefix):
        if found.last_modified < before:
            batch.append(found.key)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def folder_of(key: str) -> str:
    return key.rsplit("/", 1)[0]


async def alive_files(session: AsyncSession, keys: list[str]) -> set[str]:
    query = select(File.storage_key).where(File.storage_key.in_(keys), File.deleted_at.is_(None))
    return set(await session.scalars(query))


async def alive_datasets(session: AsyncSession, keys: list[str]) -> set[str]:
    """Those of unfinished jobs; others can be made again from their files."""
    alive: set[str] = set()
    for column in (FtJob.training_data, FtJob.validation_data):
        key: ColumnElement[str] = column["key"].as_string()
        query = select(key).where(key.in_(keys), FtJob.status.not_in(TERMINAL_STATUSES))
        alive.update(await session.scalars(query))
    return alive


async def alive_adapters(session: AsyncSession, keys: list[str]) -> set[str]:
    """A retired version's files stay for requests that began before, then go."""
    digests = {folder_of(key).rsplit("/", 1)[-1] for key in keys}
    served = or_(AdapterVersion.state != "RETIRED", AdapterVersion.retired_at > now() - timedelta(days=1))
    query = select(AdapterVersion.digest).where(AdapterVersion.digest.in_(digests), served)
    alive = set(await session.scalars(query))
    return {key for key in keys if folder_of(key).rsplit("/", 1)[-1] in alive}


async def alive_checkpoints(session: AsyncSession, keys: list[str]) -> set[str]:
    manifests = {f"{folder_of(key)}/manifest.json" for key in keys}
    query = select(Checkpoint.manifest_key).where(
        Checkpoint.manifest_key.in_(manifests), Checkpoint.expired_at.is_(None)
    )
    alive = {folder_of(manifest) for manifest in await session.scalars(query)}
    return {key for key in keys if folder_of(key) in alive}


FindAlive = Callable[[AsyncSession, list[str]], Awaitable[set[str]]]
ALIVE: dict[str, FindAlive] = {
    "files": alive_files,
    "datasets": alive_datasets,
    "adapters": alive_adapters,
    "checkpoints": alive_checkpoints,
}
