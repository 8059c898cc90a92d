"""Real services between the real servers, for tests that name the settings which theirs need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from shared.config import Settings
    from shared.db import SessionFactory
    from shared.queue import InferenceClient
    from shared.storage import ObjectStore
    from tests.e2e.processes import Processes
    from tests.e2e.workload import Jobs


@pytest.fixture
def processes(settings: Settings, tmp_path: Path) -> Iterator[Processes]:
    """The adapter store runs; a test starts its workers beside it."""
    from tests.e2e.processes import STORE, Processes, answers, wait_until

    running = Processes(settings, tmp_path)
    running.start(STORE)
    wait_until(lambda: answers(f"{settings.adapter_store_url}/livez"), "the adapter store")
    yield running
    running.stop()


@pytest.fixture
def jobs(
    settings: Settings, session_factory: SessionFactory, engine: AsyncEngine, object_store: ObjectStore
) -> Jobs:
    from tests.e2e.workload import Jobs

    return Jobs(settings, session_factory, engine, object_store)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[InferenceClient]:
    """As one of the API's processes."""
    from shared.queue import InferenceClient, open_async_redis

    async with (
        open_async_redis(settings.redis_url) as redis,
        InferenceClient(redis, settings, "api") as client,
    ):
        yield client
