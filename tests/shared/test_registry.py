"""Model names, versions and aliases."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from shared import registry, versions
from shared.db import SessionFactory
from shared.errors import ConflictError, NotFoundError
from shared.models import AdapterVersion, AuditLog
from tests.records import BASE_DIGEST, make_queued_job, make_tenant, publish_job


async def make_versions(factory: SessionFactory, count: int, slug: str = "acme") -> list[str]:
    """Ids of versions 1 ... of the adapter `bot`, whose alias `live` is at the first."""
    made = []
    for number in range(count):
        job_id = await make_queued_job(factory, slug, suffix="bot")
        made.append((await publish_job(factory, job_id, f"{slug}{number}".encode())).version_id)
    return made


async def resolve(factory: SessionFactory, name: str, slug: str = "acme", **kwargs: str) -> str | None:
    async with factory.begin() as session:
        ref = await registry.resolve_model(session, await make_tenant(session, slug), name, **kwargs)
    return ref.version_id if ref else None


async def test_every_form_of_a_name_finds_its_version(session_factory: SessionFactory) -> None:
    first, second = await make_versions(session_factory, 2)
    short = second.removeprefix("ver_")[:8]
    for name, expected in {
        "acme/bot": first,
        "acme/bot@live": first,
        "acme/bot@1": first,
        "acme/bot@2": second,
        f"ft:tiny:acme:bot:{short}": second,
    }.items():
        assert await resolve(session_factory, name) == expected, name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tiny",
        "bot",
        "acme/",
        "/bot",
        "acme/bot@",
        "acme/bot@3",
        "acme/bot@staging",
        "acme/bot@99999999999999999999",
        "acme/bot@²",
        "other/bot",
        "acme/bot/x",
        "acme/../bot",
        "ft:tiny:acme:bot:00000000",
        "acme/bot\n",
        "' OR 1=1 --",
    ],
)
async def test_an_unknown_name_is_nobody(session_factory: SessionFactory, name: str) -> None:
    await make_versions(session_factory, 1)
    assert await resolve(session_factory, name) is None


async def test_another_tenants_model_is_unknown_by_any_name(session_factory: SessionFactory) -> None:
    [version_id] = await make_versions(session_factory, 1)
    async with session_factory.begin() as session:
        version = await session.get_one(AdapterVersion, version_id)
    for name in ("acme/bot", "acme/bot@1", version.model_name, version_id, version.digest):
        assert await resolve(session_factory, name, "other") is None
    async with session_factory.begin() as session:
        assert await registry.list_models(session, await make_tenant(session, "other")) == []


async def test_a_version_of_another_base_is_unknown(session_factory: SessionFactory) -> None:
    [version_id] = await make_versions(session_factory, 1)
    assert await resolve(session_factory, "acme/bot", base_digest=BASE_DIGEST) == version_id
    assert await resolve(session_factory, "acme/bot", base_digest="0" * 64) is None


async def test_live_stays_until_it_is_moved_or_a_job_asks(session_factory: SessionFactory) -> None:
    first, _ = await make_versions(session_factory, 2)
    assert await resolve(session_factory, "acme/bot") == first
    job_id = await make_queued_job(session_factory, suffix="bot", promote=True)
    promoted = (await publish_job(session_factory, job_id, b"third")).version_id
    assert await resolve(session_factory, "acme/bot") == promoted


async def test_a_job_without_a_suffix_has_an_adapter_of_its_own(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    reply = await publish_job(session_factory, job_id)
    assert reply.model == f"ft:tiny:acme::{reply.version_id[4:12]}"
    assert await resolve(session_factory, f"acme/{job_id}") == reply.version_id


async def move(factory: SessionFactory, alias: str, number: int, **kwargs: int) -> None:
    async with factory.begin() as session:
        adapter = await versions.get_adapter(session, await make_tenant(session), "bot", lock=True)
        version = await versions.get_version(session, adapter, number)
        canary = kwargs.get("canary")
        await versions.move_alias(
            session,
            adapter,
            alias,
            version,
            actor="admin",
            canary=await versions.get_version(session, adapter, canary) if canary else None,
            canary_percent=kwargs.get("percent", 0),
        )


async def roll_back(factory: SessionFactory, alias: str = "live") -> None:
    async with factory.begin() as session:
        adapter = await versions.get_adapter(session, await make_tenant(session), "bot", lock=True)
        await versions.roll_back(session, adapter, alias, actor="admin")


async def test_an_alias_moves_and_rolls_back_with_an_audit_line(session_factory: SessionFactory) -> None:
    first, second = await make_versions(session_factory, 2)
    with pytest.raises(ConflictError, match="not moved"):
        await roll_back(session_factory)
    await move(session_factory, "live", 2)
    assert await resolve(session_factory, "acme/bot") == second
    await roll_back(session_factory)
    assert await resolve(session_factory, "acme/bot") == first
    await move(session_factory, "staging", 2)
    assert await resolve(session_factory, "acme/bot@staging") == second
    async with session_factory.begin() as session:
        query = select(AuditLog).where(AuditLog.actor == "admin").order_by(AuditLog.id)
        lines = [(line.action, line.details["version"]) for line in await session.scalars(query)]
    assert lines == [("alias.move", 2), ("alias.move", 1), ("alias.move", 2)]


async def test_a_canary_gets_its_share_of_the_requests(session_factory: SessionFactory) -> None:
    first, second = await make_versions(session_factory, 2)
    await move(session_factory, "live", 1, canary=2, percent=50)
    drawn = {await resolve(session_factory, "acme/bot") for _ in range(40)}
    assert drawn == {first, second}
    await move(session_factory, "live", 1, canary=2, percent=100)
    assert {await resolve(session_factory, "acme/bot") for _ in range(5)} == {second}
    await move(session_factory, "live", 1)
    assert {await resolve(session_factory, "acme/bot") for _ in range(5)} == {first}


async def retire(factory: SessionFactory, number: int, *, drop_aliases: bool = False) -> None:
    async with factory.begin() as session:
        adapter = await versions.get_adapter(session, await make_tenant(session), "bot", lock=True)
        version = await versions.get_version(session, adapter, number)
        await versions.retire_version(session, adapter, version, actor="admin", drop_aliases=drop_aliases)


async def test_a_retired_version_is_served_no_more(session_factory: SessionFactory) -> None:
    await make_versions(session_factory, 2)
    await retire(session_factory, 2)
    await retire(session_factory, 2)
    assert await resolve(session_factory, "acme/bot@2") is None
    with pytest.raises(ConflictError, match="RETIRED"):
        await move(session_factory, "live", 2)
    with pytest.raises(NotFoundError):
        await move(session_factory, "live", 7)


async def test_an_alias_protects_its_version(session_factory: SessionFactory) -> None:
    first, _ = await make_versions(session_factory, 2)
    with pytest.raises(ConflictError, match="served as live"):
        await retire(session_factory, 1)
    assert await resolve(session_factory, "acme/bot") == first
    await move(session_factory, "live", 1, canary=2, percent=100)
    await retire(session_factory, 2, drop_aliases=True)
    assert await resolve(session_factory, "acme/bot") == first, "only the canary went"
    await retire(session_factory, 1, drop_aliases=True)
    assert await resolve(session_factory, "acme/bot") is None


async def test_deleting_a_model_retires_it_by_its_name(session_factory: SessionFactory) -> None:
    [version_id] = await make_versions(session_factory, 1)
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        name = (await session.get_one(AdapterVersion, version_id)).model_name
        with pytest.raises(NotFoundError):
            await versions.retire_model(session, other, name, actor="key:x")
        await versions.retire_model(session, tenant, name, actor="key:x")
        with pytest.raises(NotFoundError):
            await versions.retire_model(session, tenant, name, actor="key:x")
    assert await resolve(session_factory, "acme/bot") is None


async def test_models_are_listed_by_their_own_and_their_live_name(session_factory: SessionFactory) -> None:
    first, second = await make_versions(session_factory, 2)
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        models = await registry.list_models(session, tenant, base_digest=BASE_DIGEST)
        assert await registry.list_models(session, tenant, base_digest="0" * 64) == []
    names = {model.name: model.ref.version_id for model in models}
    assert names == {
        f"ft:tiny:acme:bot:{first[4:12]}": first,
        f"ft:tiny:acme:bot:{second[4:12]}": second,
        "acme/bot": first,
    }
