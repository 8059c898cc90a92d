"""What tests get of the real servers: a database of their own, an empty Valkey, and settings that name them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psycopg

    from services.embedded import EmbeddedPostgres, EmbeddedRedis
    from shared.config import Settings

TEMPLATE = "migrated"  # the database with the newest schema
numbers = itertools.count(1)


@contextmanager
def own_database(
    postgres: EmbeddedPostgres, admin: psycopg.Connection, template: str = TEMPLATE
) -> Iterator[str]:
    """The URL of a copy of `template`, which nobody may be connected to."""
    name = f"test_{next(numbers)}"
    # nothing here outlives a crash, so that files may be copied without their way through the log, in half the time
    admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield postgres.url_of(name)
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def empty(server: EmbeddedRedis) -> str:
    """The URL of the server, with nothing in it; Celery's broker is database 1 of the same server."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


def make_settings(
    database_url: str, redis_server: EmbeddedRedis, model_dir: Path, folder: Path, **changes: object
) -> Settings:
    """Files lie below `folder`."""
    from shared.config import Settings

    values: dict[str, object] = {
        "database_url": database_url,
        "redis_url": redis_server.url,
        "celery_broker_url": redis_server.celery_url_of(1),
        "object_store_url": f"file://{folder}/objects",
        "spool_dir": folder / "spool",
        "profile_dir": str(folder / "profiles"),
        "internal_token": "internal-token-of-the-tests",
        "key_pepper": "pepper-of-the-tests",
        "admin_password": "password-of-the-tests",
        "session_secret": "session-secret-of-the-tests",
        "model_dir": model_dir,
        "served_model_name": "tiny",
        "device": "cpu",
        "num_threads": 1,
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]
