"""Tenants and their API keys: `sk-flexllm-<prefix>-<secret>`.

The secret has 256 random bits. Stored is HMAC-SHA256 of the whole key under the server's pepper, found by the
prefix and compared in constant time; the key itself is shown once, at its creation.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from pydantic import SecretStr
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.audit import audit
from shared.db import now
from shared.errors import ConflictError, InvalidRequestError, NotFoundError
from shared.ids import new_uuid
from shared.models import ApiKey, Tenant

Scope = Literal["infer", "train", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "train", "admin")  # admin: also other tenants' registry
KEY = re.compile(r"sk-flexllm-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,38}")
NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """Who a verified key speaks for."""

    key_id: str
    tenant_id: str
    org: str
    scopes: frozenset[str]
    tenant_weight: float


def check_pepper(pepper: SecretStr) -> None:
    """A service that would store or verify keys without a secret does not start."""
    if not pepper.get_secret_value():
        raise ValueError("key_pepper is empty: set FLEXLLM_KEY_PEPPER to a long random value and keep it")


def hash_key(pepper: SecretStr, key: str) -> str:
    return hmac.new(pepper.get_secret_value().encode(), key.encode(), hashlib.sha256).hexdigest()


async def create_tenant(
    session: AsyncSession, name: str, slug: str, *, weight: float = 1.0, actor: str = "system"
) -> Tenant:
    """`slug` is the organisation in model names and stays for ever."""
    if SLUG.fullmatch(slug) is None:
        raise InvalidRequestError(
            f"{slug!r} is no slug of lower case letters, digits and hyphens", param="slug"
        )
    if await session.scalar(select(Tenant.id).where(Tenant.slug == slug)) is not None:
        raise ConflictError(f"there is a tenant {slug!r} already", param="slug")
    tenant = Tenant(id=new_uuid(), name=name, slug=slug, weight=weight)
    session.add(tenant)
    await session.flush()
    audit(session, tenant.id, actor, "tenant.create", tenant.id, slug=slug)
    return tenant


async def find_tenant(session: AsyncSession, slug: str) -> Tenant | None:
    return await session.scalar(select(Tenant).where(Tenant.slug == slug))


async def create_key(
    session: AsyncSession,
    tenant_id: str,
    pepper: SecretStr,
    *,
    name: str,
    scopes: tuple[Scope, ...] = ("infer", "train"),
    expires_after: timedelta | None = None,
    actor: str = "system",
) -> tuple[ApiKey, str]:
    """The row, and the key to show once."""
    check_pepper(pepper)
    prefix = secrets.token_hex(6)
    key = f"sk-flexllm-{prefix}-{secrets.token_urlsafe(32)}"
    row = ApiKey(
        id=new_uuid(),
        tenant_id=tenant_id,
        name=name,
        prefix=prefix,
        key_hash=hash_key(pepper, key),
        scopes=list(scopes),
        expires_at=None if expires_after is None else now() + expires_after,
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    audit(session, tenant_id, actor, "key.create", row.id, name=name, scopes=" ".join(scopes))
    return row, key


async def verify_key(session: AsyncSession, pepper: SecretStr, key: str) -> KeyOwner | None:
    """The owner of a valid key, else None; an unknown prefix costs the same comparison."""
    match = KEY.fullmatch(key)
    if match is None:
        return None
    query = select(ApiKey, Tenant).join(Tenant, Tenant.id == ApiKey.tenant_id)
    found = await session.execute(
        query.where(
            ApiKey.prefix == match[1],
            ApiKey.revoked_at.is_(None),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
        )
    )
    row = found.one_or_none()
    stored = row[0].key_hash if row else NO_HASH
    if not hmac.compare_digest(stored, hash_key(pepper, key)) or row is None:
        return None
    api_key, tenant = row
    return KeyOwner(
        key_id=api_key.id,
        tenant_id=tenant.id,
        org=tenant.slug,
        scopes=frozenset(api_key.scopes),
        tenant_weight=tenant.weight,
    )


async def revoke_key(session: AsyncSession, tenant_id: str, key_id: str, *, actor: str = "system") -> None:
    """Refused from now on; services that cache keys notice within their cache's time."""
    row = await session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id))
    if row is None:
        raise NotFoundError(f"no API key {key_id!r}")
    if row.revoked_at is None:
        row.revoked_at = now()
        audit(session, tenant_id, actor, "key.revoke", key_id)
    await session.flush()


async def list_keys(session: AsyncSession, tenant_id: str) -> list[ApiKey]:
    query = select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.created_at)
    return list(await session.scalars(query))
