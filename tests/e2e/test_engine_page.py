"""A real worker's iterations on the console of the real adapter store."""

from __future__ import annotations

import asyncio
from signal import SIGKILL

import httpx
import pytest

from services import child
from shared.config import Settings
from shared.queue import InferenceClient
from tests.adapter_store.console_client import Operator
from tests.e2e.processes import WORKER, Processes, with_short_timers
from tests.e2e.workload import Jobs, collect, make_request


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Those of a worker that is soon seen to be dead."""
    return with_short_timers(settings, worker_ttl_s=2.0)


async def test_what_a_worker_computes_is_on_the_page_and_stays_a_while_when_it_dies(
    settings: Settings, processes: Processes, client: InferenceClient, jobs: Jobs
) -> None:
    worker = processes.start(WORKER)
    job = await jobs.make()
    await asyncio.gather(*(collect(client, make_request(settings, i)) for i in range(6)))
    await jobs.until("succeeded", *job)
    await asyncio.sleep(1.0)  # the last batch is on its way

    async with httpx.AsyncClient(base_url=settings.adapter_store_url, trust_env=False) as browser:
        operator = Operator(browser)
        await operator.sign_in()
        now = (await operator.get("/engine.json")).json()
        known = {name: [v for v in column if v is not None] for name, column in now["slots"].items()}
        for kind in ("decode", "prefill", "forward", "backward", "ms", "predicted_ms"):
            assert max(known[kind]) > 0, kind
        assert 0 < max(known["time_share"]) <= 1 and 0 < max(known["kv"]) <= 1
        assert now["figures"]["p50"] != "–" and not now["figures"]["dropped"]
        assert now["worker"] in await operator.read("/engine")

        child.stop(worker, SIGKILL, 10)
        for _ in range(100):
            if "No worker reports" in (text := await operator.read("/engine")):
                break
            await asyncio.sleep(0.2)
        assert now["worker"] not in text
        assert "does not report any more" in await operator.read(f"/engine?worker={now['worker']}")
        after = (await operator.get(f"/engine.json?worker={now['worker']}")).json()
        assert any(after["slots"]["backward"])
