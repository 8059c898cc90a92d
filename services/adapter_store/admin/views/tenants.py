"""Tenants, their keys, and the log of what was changed."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Form
from starlette.responses import HTMLResponse, RedirectResponse

from services.adapter_store import repository
from services.adapter_store.admin.console import ACTOR, Database, Desk, Render
from services.adapter_store.admin.queries import tenants
from shared.keys import SCOPES, Scope, create_key, create_tenant, list_keys, revoke_key

router = APIRouter()
PAGE_SIZE = 50


@router.get("/tenants")
async def tenant_list(page: Render, db: Database) -> HTMLResponse:
    return page("tenants.html", rows=await tenants.list_tenants(db))


@router.post("/tenants")
async def new_tenant(
    page: Render,
    db: Database,
    name: Annotated[str, Form(min_length=1, max_length=100)],
    slug: Annotated[str, Form(max_length=39)],
    weight: Annotated[float, Form(gt=0, le=1000, allow_inf_nan=False)] = 1.0,
) -> RedirectResponse:
    tenant = await create_tenant(db, name.strip(), slug, weight=weight, actor=ACTOR)
    return page.done(f"/tenants/{tenant.slug}", f"{tenant.name} is here. Make its first key below.")


@router.get("/tenants/{org}")
async def tenant_detail(page: Render, console: Desk, db: Database, org: str) -> HTMLResponse:
    """Shows a key that this session has just made, once."""
    tenant = await tenants.get_tenant(db, org)
    return page(
        "tenant.html",
        tenant=tenant,
        keys=await list_keys(db, tenant.id),
        usage=await repository.sum_usage(db, tenant.id),
        scopes=SCOPES,
        new_key=console.shown_once.pop((page.session.id, org), None),
    )


@router.post("/tenants/{org}/keys")
async def new_key(
    page: Render,
    console: Desk,
    db: Database,
    org: str,
    name: Annotated[str, Form(min_length=1, max_length=100)],
    scopes: Annotated[list[Scope], Form(min_length=1)],
    days: Annotated[int, Form(ge=0, le=3650)] = 0,
) -> RedirectResponse:
    """`days` 0: the key does not expire."""
    tenant = await tenants.get_tenant(db, org)
    _, key = await create_key(
        db,
        tenant.id,
        console.settings.key_pepper,
        name=name.strip(),
        scopes=tuple(dict.fromkeys(scopes)),
        expires_after=timedelta(days=days) if days else None,
        actor=ACTOR,
    )
    console.shown_once[page.session.id, org] = key
    return page.done(f"/tenants/{org}", f"The key {name.strip()} is made.")


@router.post("/tenants/{org}/keys/{key_id}/revoke")
async def revoke(page: Render, db: Database, org: str, key_id: str) -> RedirectResponse:
    tenant = await tenants.get_tenant(db, org)
    await revoke_key(db, tenant.id, key_id, actor=ACTOR)
    return page.done(f"/tenants/{org}", "The key is revoked.")


@router.get("/audit")
async def audit_log(
    page: Render, db: Database, org: str = "", action: str = "", object: str = "", before: int | None = None
) -> HTMLResponse:
    rows = await tenants.list_audit(
        db, org=org, action=action, object_id=object, before=before, limit=PAGE_SIZE + 1
    )
    return page(
        "audit.html",
        rows=rows[:PAGE_SIZE],
        has_more=len(rows) > PAGE_SIZE,
        before=before,
        orgs=await tenants.list_orgs(db),
        actions=await tenants.list_actions(db),
        org=org,
        action=action,
        object_id=object,
    )
