"""What nothing names any more goes; what anything names stays."""

from __future__ import annotations

import pytest
from sqlalchemy import select, text, update

from services.adapter_store import garbage
from services.adapter_store.tasks import collect_garbage
from shared import job_leases, versions
from shared.config import Settings
from shared.db import SessionFactory, make_engine
from shared.files import delete_file, file_key
from shared.job_state import end_job, lock_job
from shared.messages import adapter_prefix
from shared.models import AdapterVersion, BgTask, Checkpoint, File, FtJob, Idempotency
from shared.storage import ObjectStore
from tests.records import (
    DATASET,
    claim_job,
    make_checkpoint,
    make_file,
    make_publish,
    make_queued_job,
    make_tenant,
    publish_job,
    put_adapter,
)


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    """Every object counts as old."""
    return settings.model_copy(update={"objects_kept_s": -5.0})


async def keys_of(store: ObjectStore, prefix: str) -> list[str]:
    return sorted([found.key async for found in store.list(prefix)])


async def test_young_objects_are_left_alone(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings
) -> None:
    await object_store.put("files/t/orphan", b"x")
    assert await garbage.remove_orphans(session_factory, object_store, settings) == []


async def test_files_stay_with_their_rows(
    session_factory: SessionFactory, object_store: ObjectStore, impatient: Settings
) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        kept, deleted = await make_file(session, tenant), await make_file(session, tenant)
        await delete_file(session, tenant, deleted)
    for key in (file_key(tenant, kept), file_key(tenant, deleted), "files/nobody/x"):
        await object_store.put(key, b"x")
    await garbage.remove_orphans(session_factory, object_store, impatient)
    assert await keys_of(object_store, "files") == [file_key(tenant, kept)]


async def test_datasets_stay_while_a_job_may_need_them(
    session_factory: SessionFactory, object_store: ObjectStore, impatient: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    for key in (DATASET.key, "datasets/orphan"):
        await object_store.put(key, b"x")
    await garbage.remove_orphans(session_factory, object_store, impatient)
    assert await keys_of(object_store, "datasets") == [DATASET.key]
    async with session_factory.begin() as session:
        await end_job(session, await lock_job(session, job_id), "cancelled", "x")
    await garbage.remove_orphans(session_factory, object_store, impatient)
    assert await keys_of(object_store, "datasets") == []


async def test_adapters_stay_while_served_and_a_day_longer(
    session_factory: SessionFactory, object_store: ObjectStore, impatient: Settings
) -> None:
    served, orphan = make_publish(1, b"served"), make_publish(1, b"orphan")
    await put_adapter(object_store, served, b"served")
    await put_adapter(object_store, orphan, b"orphan")
    version_id = (
        await publish_job(session_factory, await make_queued_job(session_factory), b"served")
    ).version_id
    removed = await garbage.remove_orphans(session_factory, object_store, impatient)
    assert len(removed) == 2 and all(key.startswith(adapter_prefix(orphan.digest)) for key in removed)
    async with session_factory.begin() as session:
        model = (await session.get_one(AdapterVersion, version_id)).model_name
        await versions.retire_model(session, await make_tenant(session), model, actor="admin")
    assert await garbage.remove_orphans(session_factory, object_store, impatient) == []
    async with session_factory.begin() as session:
        long_ago = AdapterVersion.retired_at - text("interval '2 days'")
        await session.execute(update(AdapterVersion).values(retired_at=long_ago))
    assert len(await garbage.remove_orphans(session_factory, object_store, impatient)) == 2


async def commit(factory: SessionFactory, store: ObjectStore, job_id: str, fence: int, step: int) -> str:
    """A checkpoint with its files; returns their folder."""
    folder = f"checkpoints/{job_id}/{fence}-{step}"
    for name in ("adapter.safetensors", "manifest.json"):
        await store.put(f"{folder}/{name}", b"x")
    request = make_checkpoint(fence, step, manifest_key=f"{folder}/manifest.json")
    async with factory.begin() as session:
        await job_leases.commit_checkpoint(session, job_id, request)
    return folder


async def test_the_newest_checkpoints_stay_until_the_job_is_over(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    folders = [await commit(session_factory, object_store, job_id, fence, step) for step in (1, 2, 3, 4)]
    assert await garbage.expire_checkpoints(session_factory, object_store, settings) == 2
    assert {garbage.folder_of(key) for key in await keys_of(object_store, "checkpoints")} == set(folders[2:])
    async with session_factory.begin() as session:
        offered = await job_leases.committed_checkpoints(session, job_id)
    assert [each.step for each in offered] == [4, 3]
    async with session_factory.begin() as session:
        await job_leases.publish(session, job_id, make_publish(fence))
    assert await garbage.expire_checkpoints(session_factory, object_store, settings) == 2
    assert await keys_of(object_store, "checkpoints") == []
    async with session_factory.begin() as session:
        assert len(list(await session.scalars(select(Checkpoint)))) == 4, "the list of them stays"


async def test_uncommitted_checkpoints_go_when_they_are_old(
    session_factory: SessionFactory, object_store: ObjectStore, impatient: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    folder = await commit(session_factory, object_store, job_id, fence, 1)
    await object_store.put(f"checkpoints/{job_id}/{fence}-2/adapter.safetensors", b"x")
    await garbage.remove_orphans(session_factory, object_store, impatient)
    assert {garbage.folder_of(key) for key in await keys_of(object_store, "checkpoints")} == {folder}


async def test_collecting_expires_files_and_old_rows(
    session_factory: SessionFactory, object_store: ObjectStore, settings: Settings
) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        expired = await make_file(session, tenant, expires_after_s=-1)
        kept = await make_file(session, tenant, expires_after_s=3600)
        session.add(Idempotency(tenant_id=tenant, key="old", request_hash="x", resource_id="y"))
        session.add(Idempotency(tenant_id=tenant, key="new", request_hash="x", resource_id="y"))
        await session.flush()
        day = text("interval '25 hours'")
        old = update(Idempotency).where(Idempotency.key == "old")
        await session.execute(old.values(created_at=Idempotency.created_at - day))
    engine = make_engine(settings, pooled=False)
    await collect_garbage(settings, engine)
    await engine.dispose()
    async with session_factory.begin() as session:
        assert list(await session.scalars(select(Idempotency.key))) == ["new"]
        assert list(await session.scalars(select(File.id).where(File.deleted_at.is_(None)))) == [kept]
        assert list(await session.scalars(select(BgTask.ref))) == [file_key(tenant, expired)]
        assert list(await session.scalars(select(FtJob))) == []
