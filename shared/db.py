"""Connections to Postgres: short transactions, bounded waits, one tenant at a time.

Every tenant table has row level security as a second net behind the repositories' own filters. A connection
starts as the service (`app.tenant = '*'`, all rows); `tenant_transaction` narrows one transaction to one
tenant. A connection that says neither sees nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from sqlalchemy import DateTime, NullPool, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.sql.functions import Function

from shared.config import Settings

SessionFactory = async_sessionmaker[AsyncSession]


def make_engine(settings: Settings, *, statement_timeout_s: float = 5.0, pooled: bool = True) -> AsyncEngine:
    """`pooled=False` for short-lived event loops, such as a Celery task's own."""
    options = {
        "statement_timeout": int(statement_timeout_s * 1000),
        "lock_timeout": 2000,
        "idle_in_transaction_session_timeout": 10_000,
        "app.tenant": "*",
    }
    connect_args = {
        "connect_timeout": 3,
        "keepalives_idle": 15,
        "application_name": "flexllm",
        "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
    }
    if not pooled:
        return create_async_engine(settings.database_url, poolclass=NullPool, connect_args=connect_args)
    return create_async_engine(
        settings.database_url,
        pool_size=10,
        max_overflow=5,
        pool_timeout=1.0,
        pool_pre_ping=True,
        connect_args=connect_args,
    )


def session_factory(engine: AsyncEngine) -> SessionFactory:
    """`async with factory.begin() as session:` is one transaction; rows stay readable after it."""
    return async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def tenant_transaction(factory: SessionFactory, tenant_id: str) -> AsyncIterator[AsyncSession]:
    """One transaction that can see and write rows of this tenant only."""
    async with factory.begin() as session:
        await session.execute(select(func.set_config("app.tenant", tenant_id, True)))
        yield session


def now() -> Function[datetime]:
    """The database's clock: the only one that leases, backoff and expiry go by."""
    return func.clock_timestamp(type_=DateTime(timezone=True))
