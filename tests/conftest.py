"""Real servers for every test: PostgreSQL, Valkey and an object store, started once a process.

Each test gets its own database, cloned from a migrated template, and an empty Valkey. Processes of
pytest-xdist have servers of their own. Imports stand inside the fixtures, so that tests of the engine run
where no server is installed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernels.interpreter import PASSED_INTERPRETED
from tests.servers import TEMPLATE, empty, make_settings, own_database

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine

    from services.embedded import EmbeddedPostgres, EmbeddedRedis
    from shared.config import Settings
    from shared.db import SessionFactory
    from shared.storage import ObjectStore


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the tests of kernels, of which a process of its own runs each folder."""
    reports = terminalreporter.stats.get("passed", [])
    counts = [n for report in reports for name, n in report.user_properties if name == PASSED_INTERPRETED]
    if counts:
        terminalreporter.write_line(f"{sum(counts)} tests {PASSED_INTERPRETED}, in {len(counts)} folders")


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
    """A connection that creates and drops databases; the template has the newest schema."""
    import psycopg

    from migrations.run import upgrade
    from shared.config import Settings

    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
        upgrade(Settings(database_url=postgres.url_of(TEMPLATE)))
        yield connection


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, postgres_admin: psycopg.Connection) -> Iterator[str]:
    """A migrated database of the test's own."""
    with own_database(postgres, postgres_admin) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    return empty(redis_server)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a ChatML template."""
    from tests.builders import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def settings(
    database_url: str, redis_url: str, redis_server: EmbeddedRedis, tiny_model_dir: Path, tmp_path: Path
) -> Settings:
    return make_settings(database_url, redis_server, tiny_model_dir, tmp_path)


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
