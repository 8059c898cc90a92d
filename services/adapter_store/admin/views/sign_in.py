"""In and out."""

from __future__ import annotations

import math
from typing import Annotated

import structlog
from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from services.adapter_store.admin.auth import new_session
from services.adapter_store.admin.console import Desk, Page, Render
from services.adapter_store.admin.guard import COOKIE, LOGIN
from services.adapter_store.admin.pages import cookie_path

router = APIRouter()
log = structlog.get_logger()


@router.get(LOGIN)
async def login_page(page: Render, target: str = "") -> Response:
    """`next` is where the operator wanted to go."""
    wanted = page.request.query_params.get("next", target)
    if page.session.is_operator:
        return RedirectResponse(local_target(page.request, wanted), 303)
    return login_form(page, wanted)


def login_form(page: Page, wanted: str, problem: str = "", status: int = 200) -> HTMLResponse:
    response = page("login.html", status=status, wanted=wanted, problem=problem)
    page.console.pages.keep_session(page.request, response, page.session)
    return response


@router.post(LOGIN)
async def login(
    page: Render,
    console: Desk,
    password: Annotated[str, Form(max_length=1024)] = "",
    wanted: Annotated[str, Form(max_length=2048)] = "",
) -> Response:
    address = page.request.client.host if page.request.client else "local"
    wait_s = math.ceil(console.throttle.wait_s(address))
    if wait_s > 0:
        response = login_form(page, wanted, f"Too many attempts. Try again in {wait_s} seconds.", 429)
        response.headers["retry-after"] = str(wait_s)
        return response
    if not console.gate.is_password(password):
        console.throttle.note_failure(address)
        log.warning("admin_login_refused", address=address)
        return login_form(page, wanted, "That is not the password.", 401)
    console.throttle.forget(address)
    log.info("admin_login", address=address)
    redirect = RedirectResponse(local_target(page.request, wanted), 303)
    console.pages.keep_session(page.request, redirect, new_session(is_operator=True))
    return redirect


@router.post("/logout")
async def logout(page: Render, console: Desk) -> RedirectResponse:
    console.gate.end(page.session)
    for owner in [owner for owner in console.shown_once if owner[0] == page.session.id]:
        del console.shown_once[owner]
    response = page.done(LOGIN, "You are signed out.")
    response.delete_cookie(COOKIE, path=cookie_path(page.request))
    return response


def local_target(request: Request, wanted: str) -> str:
    """Never out of the console, whatever the link said."""
    home = request.scope.get("root_path", "") + "/"
    is_ours = wanted.startswith(home) and "//" not in wanted and "\\" not in wanted
    return wanted if is_ours and wanted.isprintable() else home
