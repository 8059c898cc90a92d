"""The schema's own promises: migrated equals declared, and no tenant sees another's rows."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, select, text, update
from sqlalchemy.exc import DBAPIError

from migrations.run import upgrade
from shared.config import Settings
from shared.db import SessionFactory, tenant_transaction
from shared.models import Base, FtJob, Tenant
from tests.records import make_file, make_job, make_queued_job, make_tenant, publish_job


def test_migrated_schema_equals_the_models(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(database_url: str) -> None:
    upgrade(Settings(database_url=database_url))


async def test_a_tenant_transaction_sees_its_own_rows_only(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        session.add_all([Tenant(id="a", name="A", slug="a"), Tenant(id="b", name="B", slug="b")])
    async with tenant_transaction(session_factory, "a") as session:
        assert list(await session.scalars(select(Tenant.id))) == ["a"]
    async with session_factory.begin() as session:
        assert len(list(await session.scalars(select(Tenant.id)))) == 2


async def test_the_database_itself_keeps_tenants_apart(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
    async with tenant_transaction(session_factory, tenant) as session:
        job = await make_job(session, tenant, idempotency_key="k", suffix="bot")
    await publish_job(session_factory, await make_queued_job(session_factory))
    async with tenant_transaction(session_factory, other) as session:
        for table in Base.metadata.tables.values():
            if "tenant_id" in table.columns:
                seen = set(await session.scalars(select(table.c.tenant_id)))
                assert seen <= {other}, table.name
        assert (await session.execute(update(FtJob).values(step=1))).rowcount == 0  # type: ignore[attr-defined]
    async with tenant_transaction(session_factory, tenant) as session:
        assert (await session.get_one(FtJob, job.id)).step == 0
    with pytest.raises(DBAPIError, match="row-level security"):
        async with tenant_transaction(session_factory, other) as session:
            await make_file(session, tenant)


def test_a_connection_that_names_no_tenant_sees_nothing(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("SELECT set_config('app.tenant', '*', true)"))
        connection.execute(text("INSERT INTO tenant (id, name, slug) VALUES ('a', 'A', 'a')"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM tenant")).scalar_one() == 0
    engine.dispose()


async def test_every_table_with_a_tenant_has_row_level_security(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        secured = set(
            await session.scalars(
                text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity")
            )
        )
    with_tenant = {table.name for table in Base.metadata.tables.values() if "tenant_id" in table.columns}
    assert secured == with_tenant | {"tenant"}
