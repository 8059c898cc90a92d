"""Who changed what in the registry."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from shared.models import AuditLog

Detail = str | int | float | bool | None


def audit(
    session: AsyncSession, tenant_id: str, actor: str, action: str, object_id: str, **details: Detail
) -> None:
    """Written in the transaction of the change. `actor`: `key:<id>`, `job:<id>`, `admin` or `system`."""
    session.add(
        AuditLog(tenant_id=tenant_id, actor=actor, action=action, object_id=object_id, details=details)
    )
