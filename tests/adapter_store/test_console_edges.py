"""What the console shows of an empty registry, of long lists, of faults, and of names that are attacks."""

from __future__ import annotations

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from services.adapter_store.admin import formats
from services.adapter_store.admin.queries import jobs
from services.adapter_store.main import create_app
from shared import job_leases
from shared.config import Settings
from shared.db import SessionFactory
from shared.job_state import add_event, end_job, lock_job
from shared.keys import create_key, create_tenant
from shared.messages import BeatRequest, StepMetrics
from shared.models import FtJob
from tests.adapter_store.console_client import Operator
from tests.records import claim_job, make_file, make_job, make_queued_job, make_tenant

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


async def test_an_empty_registry_says_what_to_do(operator: Operator) -> None:
    for path, words in {
        "/": ("No job yet", "No worker reports", "python -m services.gpu_worker", "/v1/fine_tuning/jobs"),
        "/jobs": ("No job yet", "purpose=fine-tune"),
        "/jobs?status=failed": ("No job fits",),
        "/adapters": ("No adapter yet", "&#34;model&#34;: &#34;tiny&#34;"),
        "/tenants": ("No tenant yet", "flexllm keys create"),
        "/audit": ("No line",),
    }.items():
        text = await operator.read(path)
        assert [word for word in words if word not in text] == [], path


async def test_without_redis_the_console_shows_what_the_database_knows(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0", "dispatch_s": 60.0}))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://store") as client,
    ):
        operator = Operator(client)
        await operator.sign_in()
        assert "Redis does not answer" in await operator.read("/")
        assert "No job yet" in await operator.read("/jobs")
        assert "Redis does not answer" in await operator.read("/engine")
        assert (await operator.get("/engine.json")).json() == {"worker": "", "figures": {}, "slots": {}}


async def test_long_lists_have_pages(operator: Operator, session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant_id = await make_tenant(session)
        file_id = await make_file(session, tenant_id)
        for number in range(30):
            await make_job(session, tenant_id, training_file=file_id, suffix=f"job-{number}")
        newest = await session.scalar(select(FtJob.seq).where(FtJob.adapter_name == "job-5"))
    first = await operator.read("/jobs")
    assert ">job-29<" in first and ">job-5<" in first and ">job-4<" not in first
    assert f"before={newest}" in first
    second = await operator.read(f"/jobs?before={newest}")
    assert ">job-4<" in second and ">job-0<" in second and ">job-5<" not in second and "Older" not in second


async def test_a_long_job_is_thinned_but_keeps_its_evaluations(
    operator: Operator, session_factory: SessionFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_CURVE_POINTS", 10)
    job_id = await make_queued_job(session_factory)
    lease = await claim_job(session_factory, job_id)
    metrics = tuple(
        StepMetrics(step=step, train_loss=1.0, valid_loss=2.0 if step == 33 else None)
        for step in range(1, 41)
    )
    request = BeatRequest(fence=lease.fence, step=40, total_steps=40, metrics=metrics)
    async with session_factory.begin() as session:
        await job_leases.beat(session, job_id, request, 60.0)
    steps = (await operator.get(f"/jobs/{job_id}/curves.json")).json()["curves"]["step"]
    assert steps == sorted([*range(4, 41, 4), 33])


async def test_lines_that_are_wrong_are_shown_with_their_numbers(
    operator: Operator, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        job = await make_job(session, await make_tenant(session))
        job.report = {
            "training_file": {"lines": 3, "error_count": 1, "errors": [{"line": 2, "message": "no messages"}]}
        }
        await end_job(session, job, "failed", "The training_file is invalid", code="invalid_training_file")
    text = await operator.read(f"/jobs/{job.id}")
    assert "line 2</span> no messages" in text and "invalid_training_file" in text


@pytest.mark.parametrize(
    "path", ["/nope", "/jobs/ftjob-x", "/adapters/adpt_x", "/tenants/x", "/jobs/x/curves.json"]
)
async def test_what_is_not_there_is_said_in_the_same_look(operator: Operator, path: str) -> None:
    answer = await operator.get(path)
    assert answer.status_code == 404
    assert "Not Found" in answer.text and "Tenants &amp; keys" in answer.text


async def test_an_address_that_makes_no_sense_is_refused(operator: Operator) -> None:
    for path in ("/jobs?before=x", "/adapters/a?left=x", f"/jobs?q={'x' * 101}", "/audit?before=1e99"):
        answer = await operator.get(path)
        assert answer.status_code == 400, path
        assert "This address does not make sense" in answer.text
    assert (await operator.client.put("/admin/jobs", headers={})).status_code in (403, 405)


async def test_a_fault_shows_no_inside(operator: Operator, session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        job = await make_job(session, await make_tenant(session))
        await session.execute(
            update(FtJob).where(FtJob.id == job.id).values(spec={"n_epochs": "secret words"})
        )
    answer = await operator.get(f"/jobs/{job.id}")
    assert answer.status_code == 500
    assert "Something went wrong" in answer.text and "secret words" not in answer.text
    assert answer.headers["x-frame-options"] == "DENY"


async def test_names_and_messages_are_never_markup(
    operator: Operator, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        tenant = await create_tenant(session, EVIL, "evil")
        await create_key(session, tenant.id, SecretStr("pepper"), name=EVIL)
        job = await make_job(session, tenant.id, suffix=f"x{EVIL}", base_model=EVIL)
        job = await lock_job(session, job.id)
        add_event(session, job, EVIL, "warn")
        job.report = {"training_file": {"errors": [{"line": 1, "message": EVIL}], "error_count": 1}}
        await end_job(session, job, "failed", EVIL, code=EVIL)
    search = await operator.client.get("/admin/jobs", params={"q": EVIL, "org": EVIL})
    pages = [
        await operator.read(path)
        for path in ("/", "/jobs", f"/jobs/{job.id}", "/tenants", "/tenants/evil", "/audit")
    ]
    for text in (search.text, *pages):
        assert "<script>alert" not in text and "<img" not in text and "\"'><" not in text
        assert "&lt;script&gt;alert(1)" in text


def test_numbers_read_well() -> None:
    assert [formats.compact(value) for value in (None, 0, 7.4, 999.4, 999.6, 1234, 45_678, 9_876_543, 2e9)] == [
        "–", "0", "7", "999", "1k", "1.23k", "45.7k", "9.88M", "2B",
    ]  # fmt: skip
    assert [formats.duration(value) for value in (None, 4, 75, 3700, 200_000)] == [
        "–", "4 s", "1 min 15 s", "1 h 01 min", "2 d 7 h",
    ]  # fmt: skip
    assert [formats.scientific(value) for value in (0.0002, 1, 0.05, 1e-5, 0, None)] == [
        "2e-4", "1", "0.05", "1e-5", "0", "–",
    ]  # fmt: skip
    assert [formats.size(value) for value in (10, 2048, 5 << 20, None)] == ["10 B", "2.0 KiB", "5.0 MiB", "–"]
    assert (formats.change(2.0, 1.0), formats.change(1.0, 1.5), formats.change(None, 1)) == (
        "−50.0 %",
        "+50.0 %",
        "–",
    )
    assert formats.sparkline([1.0]) == "" and len(formats.sparkline([3.0, 2.0, 2.0]).split()) == 3
