"""API keys: shown once, stored as a keyed hash, gone when revoked."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from shared import keys
from shared.db import SessionFactory
from shared.errors import ConflictError, InvalidRequestError, NotFoundError
from shared.models import ApiKey
from tests.records import make_tenant

PEPPER = SecretStr("pepper")


async def make_key(factory: SessionFactory, expires_after: timedelta | None = None) -> tuple[str, str, str]:
    async with factory.begin() as session:
        tenant = await make_tenant(session)
        row, key = await keys.create_key(session, tenant, PEPPER, name="ci", expires_after=expires_after)
    return tenant, row.id, key


async def verify(factory: SessionFactory, key: str, pepper: SecretStr = PEPPER) -> keys.KeyOwner | None:
    async with factory.begin() as session:
        return await keys.verify_key(session, pepper, key)


async def test_a_key_speaks_for_its_tenant(session_factory: SessionFactory) -> None:
    tenant, key_id, key = await make_key(session_factory)
    owner = await verify(session_factory, key)
    assert owner == keys.KeyOwner(key_id, tenant, "acme", frozenset({"infer", "train"}), 1.0)


async def test_only_a_hash_under_the_pepper_is_stored(session_factory: SessionFactory) -> None:
    _, _, key = await make_key(session_factory)
    secret = key.split("-", 3)[3]
    async with session_factory.begin() as session:
        row = (await session.scalars(select(ApiKey))).one()
    assert all(secret not in str(value) for value in vars(row).values())
    assert await verify(session_factory, key, SecretStr("another pepper")) is None


async def test_every_other_key_is_nobodys(session_factory: SessionFactory) -> None:
    _, _, key = await make_key(session_factory)
    last = "A" if key[-1] != "A" else "B"
    wrong = ["", "sk-flexllm-", key[:-1] + last, key + "x", key.upper(), f" {key}", f"{key}\n", "ü" * 60]
    wrong += [key.replace(key[11:23], "0" * 12), "sk-" + "x" * 1_000_000]
    for each in wrong:
        assert await verify(session_factory, each) is None


async def test_a_revoked_or_expired_key_is_refused(session_factory: SessionFactory) -> None:
    tenant, key_id, key = await make_key(session_factory)
    async with session_factory.begin() as session:
        other = await make_tenant(session, "other")
        with pytest.raises(NotFoundError):
            await keys.revoke_key(session, other, key_id)
        await keys.revoke_key(session, tenant, key_id)
        await keys.revoke_key(session, tenant, key_id)
    assert await verify(session_factory, key) is None
    _, _, expired = await make_key(session_factory, expires_after=timedelta(seconds=-1))
    assert await verify(session_factory, expired) is None
    async with session_factory.begin() as session:
        assert len(await keys.list_keys(session, tenant)) == 2


async def test_keys_are_not_made_without_a_pepper(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        with pytest.raises(ValueError, match="FLEXLLM_KEY_PEPPER"):
            await keys.create_key(session, tenant, SecretStr(""), name="ci")


async def test_a_slug_is_plain_and_unique(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        await keys.create_tenant(session, "Acme", "acme")
        with pytest.raises(ConflictError):
            await keys.create_tenant(session, "Acme 2", "acme")
        for slug in ("", "A", "a b", "a/b", "-a", "a" * 40, "a\n"):
            with pytest.raises(InvalidRequestError):
                await keys.create_tenant(session, "x", slug)
