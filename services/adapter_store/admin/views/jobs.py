"""Finetuning jobs: the list, one job live, and the buttons that move it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

from services.adapter_store.admin.comparison import describe_report, describe_spec
from services.adapter_store.admin.console import ACTOR, Database, Page, Render
from services.adapter_store.admin.queries import adapters, jobs, tenants
from shared.audit import audit
from shared.jobs import request_cancel, request_pause, request_resume
from shared.models import TERMINAL_STATUSES, FtJob

router = APIRouter(prefix="/jobs")
PAGE_SIZE = 25
Move = Callable[[AsyncSession, str, str], Awaitable[FtJob]]


@router.get("")
async def job_list(
    page: Render,
    db: Database,
    status: str = "",
    org: str = "",
    q: Annotated[str, Query(max_length=100)] = "",
    before: int | None = None,
) -> HTMLResponse:
    wanted = jobs.JobFilter(status, org, q.strip())
    counts = await jobs.count_by_status(db, wanted)
    rows = await jobs.list_jobs(db, wanted, before=before, limit=PAGE_SIZE + 1)
    return page(
        "jobs.html",
        wanted=wanted,
        counts=counts,
        num_active=sum(counts.get(each, 0) for each in jobs.ACTIVE),
        rows=rows[:PAGE_SIZE],
        has_more=len(rows) > PAGE_SIZE,
        before=before,
        orgs=await tenants.list_orgs(db),
    )


@router.get("/{job_id}")
async def job_detail(page: Render, db: Database, job_id: str) -> HTMLResponse:
    row = await jobs.get_job_row(db, job_id)
    job = row.job
    return page(
        "job.html",
        row=row,
        job=job,
        is_over=job.status in TERMINAL_STATUSES,
        parameters=describe_spec(job.spec),
        reports={param: (report, describe_report(report)) for param, report in (job.report or {}).items()},
        events=await jobs.list_messages(db, job_id),
        checkpoints=await jobs.list_checkpoints(db, job_id),
        made=await adapters.find_adapter_of_job(db, job),
    )


@router.get("/{job_id}/curves.json")
async def job_curves(db: Database, job_id: str, from_step: int = 0) -> JSONResponse:
    """The steps from `from_step` on. Ask again from `step`: after a resume it is an earlier one."""
    job, _ = await jobs.get_job(db, job_id)
    return JSONResponse(
        {
            "status": job.status,
            "is_over": job.status in TERMINAL_STATUSES,
            "step": job.step,
            "total_steps": job.total_steps,
            "curves": await jobs.read_curves(db, job_id, from_step),
        }
    )


@router.post("/{job_id}/cancel")
async def cancel(page: Render, db: Database, job_id: str) -> RedirectResponse:
    job = await move(db, job_id, "job.cancel", request_cancel)
    done = "The job is cancelled." if job.status == "cancelled" else "The worker is asked to stop the job."
    return back_to(page, job_id, done)


@router.post("/{job_id}/pause")
async def pause(page: Render, db: Database, job_id: str) -> RedirectResponse:
    job = await move(db, job_id, "job.pause", request_pause)
    done = "The job is paused." if job.status == "paused" else "The job pauses after its next checkpoint."
    return back_to(page, job_id, done)


@router.post("/{job_id}/resume")
async def resume(page: Render, db: Database, job_id: str) -> RedirectResponse:
    await move(db, job_id, "job.resume", request_resume)
    return back_to(page, job_id, "The job goes on.")


async def move(db: AsyncSession, job_id: str, action: str, request: Move) -> FtJob:
    job, tenant = await jobs.get_job(db, job_id)
    status = job.status
    job = await request(db, tenant.id, job_id)
    audit(db, tenant.id, ACTOR, action, job_id, status=status)
    return job


def back_to(page: Page, job_id: str, message: str) -> RedirectResponse:
    return page.done(f"/jobs/{job_id}", message)
