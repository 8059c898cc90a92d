"""What a route needs, found from the request."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Query, Request

from services.adapter_store.service import Services
from shared.errors import NotAuthenticatedError, NotFoundError, NotPermittedError
from shared.keys import KeyOwner, find_tenant, verify_key

CHANGE_SCOPES = {"train", "admin"}


def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]


def bearer_token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise NotAuthenticatedError("send the header `Authorization: Bearer <key>`")
    return token


def require_internal_token(request: Request, services: ServicesDep) -> None:
    """Workers only. Compared in constant time."""
    expected = services.settings.internal_token.get_secret_value()
    if not hmac.compare_digest(bearer_token(request).encode(), expected.encode()):
        raise NotAuthenticatedError("the internal token is wrong")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose registry is meant, and who changes it."""

    tenant_id: str
    actor: str
    scopes: frozenset[str]


async def get_caller(
    request: Request,
    services: ServicesDep,
    tenant: Annotated[str | None, Query(description="another tenant's slug; needs the scope admin")] = None,
) -> Caller:
    owner = await verify(bearer_token(request), services)
    tenant_id = owner.tenant_id if tenant is None else await other_tenant(owner, tenant, services)
    return Caller(tenant_id, f"key:{owner.key_id}", owner.scopes)


async def verify(key: str, services: Services) -> KeyOwner:
    async with services.sessions.begin() as session:
        owner = await verify_key(session, services.settings.key_pepper, key)
    if owner is None:
        raise NotAuthenticatedError("the API key is not valid")
    return owner


async def other_tenant(owner: KeyOwner, slug: str, services: Services) -> str:
    if "admin" not in owner.scopes:
        raise NotPermittedError("only a key with the scope admin may name a tenant", param="tenant")
    async with services.sessions.begin() as session:
        tenant = await find_tenant(session, slug)
    if tenant is None:
        raise NotFoundError(f"no tenant {slug!r}", param="tenant")
    return tenant.id


CallerDep = Annotated[Caller, Depends(get_caller)]


def require_change_scope(caller: CallerDep) -> Caller:
    if not caller.scopes & CHANGE_SCOPES:
        raise NotPermittedError("this key may not change adapters: it has neither train nor admin scope")
    return caller


ChangerDep = Annotated[Caller, Depends(require_change_scope)]
