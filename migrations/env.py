"""Alembic's entry: one transaction, bounded lock waits, one migrator at a time. Forward only."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, text

from shared.config import Settings
from shared.models import Base

MIGRATION_LOCK = 7_315_001


def migrate(settings: Settings) -> None:
    engine = create_engine(
        settings.database_url, connect_args={"options": "-c lock_timeout=5000 -c app.tenant=*"}
    )
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = 0"))  # a second migrator waits for the first
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        connection.execute(text("SET LOCAL lock_timeout = 5000"))
        context.configure(connection=connection, target_metadata=Base.metadata)
        context.run_migrations()
    engine.dispose()


if context.is_offline_mode():
    raise SystemExit("migrations run online only: they check the database they change")
migrate(context.config.attributes.get("settings") or Settings())
