"""Rows of uploaded and result files. Their bytes lie in object storage under `storage_key`."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db import now
from shared.errors import NotFoundError
from shared.models import File
from shared.outbox import require_task
from shared.paging import Page, fetch_page


def file_key(tenant_id: str, file_id: str) -> str:
    return f"files/{tenant_id}/{file_id}"


async def create_file(
    session: AsyncSession,
    tenant_id: str,
    *,
    file_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    sha256: str,
    expires_after_s: int | None = None,
) -> File:
    """The object under `file_key(tenant_id, file_id)` is there already."""
    file = File(
        id=file_id,
        tenant_id=tenant_id,
        filename=filename,
        purpose=purpose,
        size_bytes=size_bytes,
        sha256=sha256,
        storage_key=file_key(tenant_id, file_id),
        expires_at=None if expires_after_s is None else now() + timedelta(seconds=expires_after_s),
    )
    session.add(file)
    await session.flush()
    await session.refresh(file)
    return file


def usable() -> list[ColumnElement[bool]]:
    return [File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > now())]


async def get_file(session: AsyncSession, tenant_id: str, file_id: str, *, param: str | None = None) -> File:
    query = select(File).where(File.id == file_id, File.tenant_id == tenant_id, *usable())
    file = await session.scalar(query)
    if file is None:
        raise NotFoundError(f"no file {file_id!r}", param=param)
    return file


async def list_files(
    session: AsyncSession,
    tenant_id: str,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 10_000,
    newest_first: bool = True,
) -> Page[File]:
    filters = usable()
    if purpose is not None:
        filters.append(File.purpose == purpose)
    return await fetch_page(
        session, File, tenant_id, filters, after=after, limit=limit, newest_first=newest_first
    )


async def delete_file(session: AsyncSession, tenant_id: str, file_id: str) -> None:
    """Gone for the customer at once; the task `delete_object` with the file's key removes the bytes."""
    file = await get_file(session, tenant_id, file_id)
    file.deleted_at = now()
    await require_task(session, "delete_object", file.storage_key)
