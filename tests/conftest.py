"""Real servers for every test: PostgreSQL, Valkey and an object store, started once a process.

Each test gets its own database, cloned from a migrated template, and an empty Valkey. Processes of
pytest-xdist have servers of their own. Imports stand inside the fixtures, so that tests of the engine run
where no server is installed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernels.interpreter import PASSED_INTERPRETED

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

    from services.embedded import EmbeddedPostgres, EmbeddedRedis
    from shared.config import Settings
    from shared.db import SessionFactory
    from shared.storage import ObjectStore

database_numbers = itertools.count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the tests of kernels, of which a process of its own runs each file."""
    reports = terminalreporter.stats.get("passed", [])
    counts = [n for report in reports for name, n in report.user_properties if name == PASSED_INTERPRETED]
    if counts:
        terminalreporter.write_line(f"{sum(counts)} tests {PASSED_INTERPRETED}, in {len(counts)} files")


@pytest.fixture(scope="session")
def server_dir() -> Iterator[Path]:
    """Outside pytest's own directory, which the user that PostgreSQL runs as may not enter."""
    path = Path(tempfile.mkdtemp(prefix="flexllm-tests-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(server_dir: Path) -> Iterator[EmbeddedPostgres]:
    from services.embedded import EmbeddedPostgres

    with EmbeddedPostgres(server_dir / "postgres", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(server_dir: Path) -> Iterator[EmbeddedRedis]:
    from services.embedded import EmbeddedRedis

    with EmbeddedRedis(server_dir / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_admin(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    """A connection that creates and drops databases; the template `migrated` has the newest schema."""
    import psycopg

    from migrations.run import upgrade
    from shared.config import Settings

    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE migrated")
        upgrade(Settings(database_url=postgres.url_of("migrated")))
        yield connection


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, postgres_admin: psycopg.Connection) -> Iterator[str]:
    """A migrated database of the test's own."""
    name = f"test_{next(database_numbers)}"
    postgres_admin.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
    yield postgres.url_of(name)
    postgres_admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """An empty Valkey; Celery's broker is database 1 of the same server."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a ChatML template."""
    from tests.builders import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def settings(
    database_url: str, redis_url: str, redis_server: EmbeddedRedis, tiny_model_dir: Path, tmp_path: Path
) -> Settings:
    from shared.config import Settings

    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        celery_broker_url=redis_server.celery_url_of(1),
        object_store_url=f"file://{tmp_path}/objects",
        spool_dir=tmp_path / "spool",
        profile_dir=str(tmp_path / "profiles"),
        internal_token="internal-token-of-the-tests",
        key_pepper="pepper-of-the-tests",
        admin_password="password-of-the-tests",
        session_secret="session-secret-of-the-tests",
        model_dir=tiny_model_dir,
        served_model_name="tiny",
        device="cpu",
        num_threads=1,
    )


@pytest.fixture
def object_store(settings: Settings) -> ObjectStore:
    from shared.storage import ObjectStore

    return ObjectStore.from_settings(settings)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """Needs no model, so that tests of the database alone start at once."""
    from shared.config import Settings
    from shared.db import make_engine

    engine = make_engine(Settings(database_url=database_url))
    yield engine
    await engine.dispose()


@pytest.fixture
def session_factory(engine: AsyncEngine) -> SessionFactory:
    from shared.db import session_factory

    return session_factory(engine)
