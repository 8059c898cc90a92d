"""How long a key is taken on trust."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import SQLAlchemyError

from services.api.auth import KeyCache
from shared.config import Settings
from shared.db import SessionFactory, make_engine
from shared.db import session_factory as make_factory
from shared.keys import create_key, create_tenant, revoke_key


@pytest.fixture
async def key(session_factory: SessionFactory, settings: Settings) -> tuple[str, str, str]:
    """Tenant id, key id, key."""
    async with session_factory.begin() as session:
        tenant = await create_tenant(session, "acme", "acme")
        row, key = await create_key(session, tenant.id, settings.key_pepper, name="k")
        return tenant.id, row.id, key


async def test_a_revoked_key_ends_with_the_time_it_is_cached(key, session_factory, settings) -> None:
    tenant_id, key_id, text = key
    trusting = KeyCache(session_factory, settings.key_pepper)
    checking = KeyCache(session_factory, settings.key_pepper, fresh_s=0.0)
    for cache in (trusting, checking):
        owner = await cache.find_owner(text)
        assert owner is not None
        assert owner.org == "acme"
    async with session_factory.begin() as session:
        await revoke_key(session, tenant_id, key_id)
    assert await trusting.find_owner(text) is not None
    assert await checking.find_owner(text) is None


async def test_while_the_database_is_away_only_known_keys_pass(key, session_factory, settings) -> None:
    cache = KeyCache(session_factory, settings.key_pepper, fresh_s=0.0)
    assert await cache.find_owner(key[2]) is not None
    nowhere = make_engine(
        settings.model_copy(update={"database_url": "postgresql+psycopg://x@127.0.0.1:1/x"})
    )
    cache._sessions = make_factory(nowhere)
    assert await cache.find_owner(key[2]) is not None
    with pytest.raises(SQLAlchemyError):
        await cache.find_owner(key[2][:-1] + ("A" if key[2][-1] != "A" else "B"))
    await nowhere.dispose()
