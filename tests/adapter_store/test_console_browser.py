"""The console in a real browser: what only scripts, style and policy together can show.

Needs Debian's `chromium`; without it these tests are skipped and say so.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from services.adapter_store.main import create_app
from shared import job_leases
from shared.config import Settings
from shared.db import SessionFactory
from shared.job_state import add_event, end_job, lock_job
from shared.keys import create_key, create_tenant
from shared.messages import BeatRequest, JobLease, StepMetrics, WorkerStatus
from shared.queue import InferenceWorkerQueue, IterationBatch, IterationSender, open_redis
from tests.adapter_store.console_client import PASSWORD
from tests.records import claim_job, make_job, make_queued_job, publish_job

playwright = pytest.importorskip(
    "playwright.async_api", reason="the Python package playwright is not installed: pip install playwright"
)
expect = playwright.expect
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked = 1'>"
TIMEOUT_MS = 60_000
CUT_OFF = ("ERR_INTERNET_DISCONNECTED", "Failed to fetch")  # what browser and htmx log without a network

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium"
)


@pytest.fixture
async def address(settings: Settings) -> AsyncIterator[str]:
    """The store, served on a port of its own."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/admin"
    server.should_exit = True
    await serving


@pytest.fixture
async def page(address: str, tmp_path: Path) -> AsyncIterator[playwright.Page]:
    """Signed in, with a new profile. Whatever the browser complains of fails the test."""
    complaints: list[str] = []
    async with playwright.async_playwright() as runner:
        context = await runner.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        context.set_default_timeout(TIMEOUT_MS)
        page = context.pages[0]
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        await page.goto(f"{address}/")
        await page.fill("[name=password]", PASSWORD)
        await page.click("text=Sign in")
        await page.wait_for_selector("h1:has-text('Overview')")
        yield page
        await context.close()
    assert [line for line in complaints if not any(words in line for words in CUT_OFF)] == []


async def beat(factory: SessionFactory, lease: JobLease, steps: range, loss: float) -> None:
    metrics = tuple(
        StepMetrics(step=step, train_loss=loss, train_mean_token_accuracy=0.5, learning_rate=1e-4)
        for step in steps
    )
    request = BeatRequest(fence=lease.fence, step=steps[-1], total_steps=50, metrics=metrics)
    async with factory.begin() as session:
        await job_leases.beat(session, lease.job_id, request, 300.0)


async def test_a_job_is_followed_live_and_cancelled(
    page: playwright.Page, address: str, session_factory: SessionFactory
) -> None:
    job_id = await make_queued_job(session_factory, suffix="live-bot")
    lease = await claim_job(session_factory, job_id, lease_s=300.0)
    await beat(session_factory, lease, range(1, 11), loss=2.0)
    await page.goto(f"{address}/jobs")
    await page.click("text=live-bot")
    value = page.locator('[data-value="loss training"]')
    await expect(value).to_have_text("2.000", timeout=TIMEOUT_MS)
    assert await page.locator("#charts canvas").count() == 5
    await page.evaluate("window.sameDocument = true")

    await beat(session_factory, lease, range(11, 21), loss=1.25)
    await expect(value).to_have_text("1.250", timeout=TIMEOUT_MS)  # the curve
    await page.wait_for_selector(".figure-value:has-text('20of 50 steps')")  # the page around it
    assert await page.evaluate("window.sameDocument") is True
    painted = """() => {
        const canvas = document.querySelector('[data-chart=loss] canvas');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.some((value) => value > 0);
    }"""
    assert await page.evaluate(painted)

    await page.click("text=Cancel job")
    await page.wait_for_selector("dialog[open] h2:has-text('Cancel this job?')")
    await page.click("dialog >> text=Keep it as it is")
    assert await page.locator(".pill:has-text('Cancelling')").count() == 0
    await page.click("text=Cancel job")
    await page.click("dialog >> text=Cancel job")
    await page.wait_for_selector(".banner-ok:has-text('asked to stop')")
    await page.wait_for_selector(".pill:has-text('Cancelling')")


def iterate(settings: Settings, decodes: int, windows: int) -> None:
    """A worker tells of itself and of half a second's iterations."""
    status = WorkerStatus(worker_id="w", free_blocks=60, total_blocks=100)
    batch = IterationBatch(
        age_ms=tuple(range(475, -1, -25)),
        decode_tokens=(decodes,) * 20,
        forward_tokens=(windows,) * 20,
        forward_ms=(40.0,) * 20,
        finetuning_ms=(40.0 * windows / (windows + decodes),) * 20,
        limit_ms=(100.0,) * 20,
        free_blocks=(60,) * 20,
    )
    with open_redis(settings.redis_url) as client:
        InferenceWorkerQueue(client, settings, "w").beat([], status)
        IterationSender(client, "w").send(batch)


@asynccontextmanager
async def iterating(settings: Settings, decodes: int, windows: int) -> AsyncIterator[None]:
    async def go_on() -> None:
        while True:
            await asyncio.to_thread(iterate, settings, decodes, windows)
            await asyncio.sleep(0.5)

    task = asyncio.create_task(go_on())
    yield
    task.cancel()


async def test_the_engine_is_watched_live(page: playwright.Page, address: str, settings: Settings) -> None:
    await page.click("nav >> text=Engine")
    await page.wait_for_selector("text=No worker reports")
    await page.evaluate("window.sameDocument = true")
    painted = """(chart) => {
        const canvas = document.querySelector(`[data-chart=${chart}] canvas`);
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [pixels.filter((value) => value > 0).length, pixels.reduce((sum, value) => sum + value, 0)];
    }"""

    async with iterating(settings, decodes=6, windows=0):
        value = page.locator('[data-value="tokens decode"]')
        await expect(value).to_have_text("6", timeout=TIMEOUT_MS)
        await expect(page.locator('[data-figure="p50"]')).to_have_text("40.0", timeout=TIMEOUT_MS)
        await expect(page.locator('[data-value="kv kv"]')).to_have_text("40 %", timeout=TIMEOUT_MS)
        await expect(page.locator("text=No worker reports")).to_have_count(0, timeout=TIMEOUT_MS)
        before = {chart: await page.evaluate(painted, chart) for chart in ("tokens", "time", "share")}
        assert all(count > 0 for count, _ in before.values())

    async with iterating(settings, decodes=3, windows=90):
        await expect(page.locator('[data-value="tokens forward"]')).to_have_text("90", timeout=TIMEOUT_MS)
        share = page.locator('[data-value="share time_share"]')
        await expect(share).to_have_text("97 %", timeout=TIMEOUT_MS)
        for chart, pixels in before.items():
            assert await page.evaluate(painted, chart) != pixels, chart
    assert await page.evaluate("window.sameDocument") is True


async def test_a_version_is_made_live_and_rolled_back_with_one_click_each(
    page: playwright.Page, address: str, session_factory: SessionFactory
) -> None:
    for weights in (b"1", b"2"):
        await publish_job(session_factory, await make_queued_job(session_factory, suffix="bot"), weights)
    await page.goto(f"{address}/adapters")
    await page.click("a.name:has-text('bot')")
    await page.click("text=Make live")
    await page.wait_for_selector("h1 .tag:has-text('v2 live')")
    await page.click("text=Roll back to v1")
    await page.wait_for_selector("h1 .tag:has-text('v1 live')")
    assert await page.locator("#versus canvas").count() == 2


async def test_no_name_runs_as_a_script_and_no_page_breaks_its_policy(
    page: playwright.Page, address: str, settings: Settings, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        tenant = await create_tenant(session, EVIL, "evil")
        job = await make_job(session, tenant.id, suffix=EVIL, base_model=EVIL)
        job = await lock_job(session, job.id)
        add_event(session, job, EVIL)
        await create_key(session, tenant.id, settings.key_pepper, name=EVIL)
        await end_job(session, job, "failed", EVIL, code=EVIL)
    await page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (event) => console.error(event.blockedURI))"
    )
    for path in ("/", "/jobs", f"/jobs/{job.id}", "/adapters", "/tenants", "/tenants/evil", "/audit"):
        await page.goto(f"{address}{path}")
        assert "hacked" in await page.content() or path == "/adapters"
        assert await page.evaluate("window.hacked") is None, path


async def test_a_page_says_when_it_is_cut_off_and_goes_on_afterwards(
    page: playwright.Page, address: str
) -> None:
    await page.goto(f"{address}/jobs")
    await page.context.set_offline(True)
    await page.wait_for_selector("#offline:visible")
    await page.context.set_offline(False)
    await page.wait_for_selector("#offline", state="hidden")
