"""Jobs as an operator sees them: all tenants, with their newest numbers and the shape of their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Text, cast, func, or_, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.adapter_store import repository
from shared.errors import NotFoundError
from shared.models import Checkpoint, FtEvent, FtJob, FtMetric, Tenant

ACTIVE = ("validating_files", "queued", "running", "publishing")
SPARKLINE_POINTS = 32
MAX_CURVE_POINTS = 1500
CURVE_COLUMNS = (
    "train_loss",
    "valid_loss",
    "train_mean_token_accuracy",
    "valid_mean_token_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
)


@dataclass(frozen=True, slots=True)
class JobRow:
    """`losses` are a few of the training losses, evenly spaced, oldest first."""

    job: FtJob
    org: str
    train_loss: float | None
    valid_loss: float | None
    tokens_per_s: float | None
    losses: list[float]


@dataclass(frozen=True, slots=True)
class JobFilter:
    """`status` is one of the job's, `active`, or nothing for all."""

    status: str = ""
    org: str = ""
    words: str = ""  # in the adapter's name, or the start of the id

    def conditions(self, *, with_status: bool = True) -> list[ColumnElement[bool]]:
        """Of a query over jobs and their tenants."""
        found: list[ColumnElement[bool]] = []
        if with_status and self.status:
            found.append(FtJob.status.in_(ACTIVE if self.status == "active" else (self.status,)))
        if self.org:
            found.append(Tenant.slug == self.org)
        if self.words:
            named = FtJob.adapter_name.icontains(self.words, autoescape=True)
            found.append(or_(named, FtJob.id.startswith(self.words, autoescape=True)))
        return found


async def count_by_status(session: AsyncSession, wanted: JobFilter | None = None) -> dict[str, int]:
    """Whatever the filter's own status; statuses without a job are missing."""
    conditions = (wanted or JobFilter()).conditions(with_status=False)
    query = (
        select(FtJob.status, func.count().label("jobs"))
        .join(Tenant, Tenant.id == FtJob.tenant_id)
        .where(*conditions)
        .group_by(FtJob.status)
    )
    return {row.status: row.jobs for row in await session.execute(query)}


async def list_jobs(
    session: AsyncSession, wanted: JobFilter, *, before: int | None = None, limit: int = 25
) -> list[JobRow]:
    """Newest first; `before` is the `seq` of the last job of the page before."""
    query = (
        select(FtJob, Tenant.slug, *NEWEST)
        .join(Tenant, Tenant.id == FtJob.tenant_id)
        .where(*wanted.conditions())
        .order_by(FtJob.seq.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(FtJob.seq < before)
    rows = (await session.execute(query)).all()
    losses = await sample_losses(session, [row[0] for row in rows])
    return [make_row(row, losses.get(row[0].id, [])) for row in rows]


def make_row(row: Sequence[Any], losses: list[float]) -> JobRow:
    job, org, train_loss, valid_loss, tokens_per_s = row
    return JobRow(job, org, train_loss, valid_loss, tokens_per_s, losses)


def newest(column: InstrumentedAttribute[float | None]) -> Any:
    """Of the job in the outer query."""
    return (
        select(column)
        .where(FtMetric.job_id == FtJob.id, column.is_not(None))
        .order_by(FtMetric.step.desc())
        .limit(1)
        .correlate(FtJob)
        .scalar_subquery()
    )


NEWEST = (newest(FtMetric.train_loss), newest(FtMetric.valid_loss), newest(FtMetric.tokens_per_s))


async def sample_losses(session: AsyncSession, jobs: Sequence[FtJob]) -> dict[str, list[float]]:
    """Looks up a few steps of each job by their key, however many steps there are."""
    wanted = [(job.id, step) for job in jobs for step in spaced(job.furthest_step)]
    if not wanted:
        return {}
    ids, steps = zip(*wanted, strict=True)
    columns = cast(list(ids), ARRAY(Text)), cast(list(steps), ARRAY(BigInteger))
    points = func.unnest(*columns).table_valued("job_id", "step", name="points").render_derived()
    query = (
        select(FtMetric.job_id, FtMetric.train_loss)
        .join(points, (FtMetric.job_id == points.c.job_id) & (FtMetric.step == points.c.step))
        .where(FtMetric.train_loss.is_not(None))
        .order_by(FtMetric.job_id, FtMetric.step)
    )
    found: dict[str, list[float]] = {}
    for row in await session.execute(query):
        found.setdefault(row.job_id, []).append(row.train_loss)
    return found


def spaced(last_step: int) -> list[int]:
    """At most `SPARKLINE_POINTS` steps from 1 to the last one."""
    count = min(SPARKLINE_POINTS, last_step)
    if count <= 1:
        return list(range(1, last_step + 1))
    return [1 + (last_step - 1) * i // (count - 1) for i in range(count)]


async def get_job(session: AsyncSession, job_id: str) -> tuple[FtJob, Tenant]:
    job = await repository.get_job(session, None, job_id)
    return job, await session.get_one(Tenant, job.tenant_id)


async def get_job_row(session: AsyncSession, job_id: str) -> JobRow:
    """Without the sampled losses."""
    query = select(FtJob, Tenant.slug, *NEWEST).join(Tenant, Tenant.id == FtJob.tenant_id)
    row = (await session.execute(query.where(FtJob.id == job_id))).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no job {job_id}.")
    return make_row(row, [])


async def list_messages(session: AsyncSession, job_id: str, limit: int = 100) -> list[FtEvent]:
    """Newest first, without the events that only repeat a step's numbers."""
    query = select(FtEvent).where(FtEvent.job_id == job_id, FtEvent.type == "message")
    return list(await session.scalars(query.order_by(FtEvent.seq.desc()).limit(limit)))


async def list_checkpoints(session: AsyncSession, job_id: str, limit: int = 20) -> list[Checkpoint]:
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return list(await session.scalars(query.order_by(Checkpoint.seq.desc()).limit(limit)))


@dataclass(frozen=True, slots=True)
class RecentEvent:
    event: FtEvent
    adapter_name: str
    org: str


async def list_recent_events(session: AsyncSession, limit: int = 12) -> list[RecentEvent]:
    query = (
        select(FtEvent, FtJob.adapter_name, Tenant.slug)
        .join(FtJob, FtJob.id == FtEvent.job_id)
        .join(Tenant, Tenant.id == FtEvent.tenant_id)
        .where(FtEvent.type == "message")
        .order_by(FtEvent.seq.desc())
        .limit(limit)
    )
    return [RecentEvent(*row) for row in await session.execute(query)]


async def read_curves(session: AsyncSession, job_id: str, from_step: int = 0) -> dict[str, list[Any]]:
    """Columns of equal length from this step on; of a long job every n-th step and every evaluation."""
    columns = [getattr(FtMetric, name) for name in CURVE_COLUMNS]
    mine = (FtMetric.job_id == job_id, FtMetric.step >= from_step)
    count = await session.scalar(select(func.count()).where(*mine)) or 0
    stride = 1 + (count - 1) // MAX_CURVE_POINTS if count else 1
    query = select(FtMetric.step, *columns).where(*mine).order_by(FtMetric.step)
    if stride > 1:
        query = query.where(or_(FtMetric.step % stride == 0, FtMetric.valid_loss.is_not(None)))
    rows = (await session.execute(query)).all()
    names = ("step", *CURVE_COLUMNS)
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
