"""Cursor pages in the order rows were made: `after` is the id of the last item of the page before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.errors import NotFoundError
from shared.models import Checkpoint, File, FtEvent, FtJob

Row = TypeVar("Row", Checkpoint, File, FtEvent, FtJob)


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    items: list[Row]
    has_more: bool


async def fetch_page(
    session: AsyncSession,
    table: type[Row],
    tenant_id: str,
    filters: list[ColumnElement[bool]],
    *,
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> Page[Row]:
    """Raises NotFoundError where the tenant has no row `after`."""
    query = select(table).where(table.tenant_id == tenant_id, *filters).limit(limit + 1)
    if after is not None:
        query_seq = select(table.seq).where(table.id == after, table.tenant_id == tenant_id)
        seq = await session.scalar(query_seq)
        if seq is None:
            raise NotFoundError(f"no object {after!r} to list after", param="after")
        query = query.where(table.seq < seq if newest_first else table.seq > seq)
    query = query.order_by(table.seq.desc() if newest_first else table.seq)
    rows = list(await session.scalars(query))
    return Page(rows[:limit], has_more=len(rows) > limit)
