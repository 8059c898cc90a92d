"""The console as an application of its own, to be mounted."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

import redis.asyncio
import structlog
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from services.adapter_store.admin.auth import Gate, Throttle
from services.adapter_store.admin.console import Console, check_form_token, get_console
from services.adapter_store.admin.guard import STATIC, Guard
from services.adapter_store.admin.pages import STATIC_DIR, Pages
from services.adapter_store.admin.views import adapters, engine, jobs, overview, sign_in, tenants
from shared.config import Settings
from shared.db import SessionFactory
from shared.errors import ServiceError

VIEWS = (sign_in, overview, engine, jobs, adapters, tenants)
log = structlog.get_logger()


def make_admin(settings: Settings, factory: SessionFactory, queue: redis.asyncio.Redis) -> Guard:
    """`queue` is where workers report. Raises ValueError without a password or a session secret."""
    gate = Gate(settings)
    app = FastAPI(openapi_url=None, dependencies=[Depends(check_form_token)])
    app.state.console = Console(
        settings=settings,
        factory=factory,
        redis=queue,
        gate=gate,
        throttle=Throttle(),
        pages=Pages(gate, settings.model_id),
        shown_once={},
    )
    for view in VIEWS:
        app.include_router(view.router)
    app.mount(STATIC, StaticFiles(directory=STATIC_DIR))
    app.add_exception_handler(ServiceError, on_refusal)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_bad_input)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    for outage in (OperationalError, InterfaceError, PoolTimeoutError):
        app.add_exception_handler(outage, on_outage)
    app.add_exception_handler(Exception, on_fault)
    return Guard(app, gate)


async def on_refusal(request: Request, error: ServiceError) -> Response:
    """A form that cannot be done goes back to its page, which says why."""
    if request.method == "POST" and error.status in (400, 409, 422, 429):
        return back_with(request, error.message)
    return error_page(request, error.status, error.message)


async def on_bad_input(request: Request, error: RequestValidationError) -> Response:
    problems = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
    if request.method == "POST":
        return back_with(request, f"That was not understood. {problems}.")
    return error_page(request, 400, f"This address does not make sense. {problems}.")


async def on_http_error(request: Request, error: HTTPException) -> Response:
    words = {404: "There is nothing at this address.", 405: "This address takes another kind of request."}
    return error_page(request, error.status_code, words.get(error.status_code, error.detail))


async def on_outage(request: Request, error: Exception) -> Response:
    log.warning("admin_database_error", path=request.url.path, error=type(error).__name__)
    return error_page(request, 503, "The database does not answer. Try again in a moment.")


async def on_fault(request: Request, error: Exception) -> Response:
    """The application around this one logs it: the error goes on to there."""
    return error_page(request, 500, "Something went wrong on our side. The log has the details.")


def error_page(request: Request, status: int, message: str) -> Response:
    title = HTTPStatus(status).phrase
    pages = get_console(request).pages
    return pages.render(request, "error.html", status, code=status, title=title, message=message)


def back_with(request: Request, problem: str) -> Response:
    """To the page that the form was on, by what the browser says; else to the overview."""
    root = request.scope.get("root_path", "")
    came_from = urlsplit(request.headers.get("referer", ""))
    is_ours = came_from.netloc == request.url.netloc and came_from.path.startswith(f"{root}/")
    path = came_from.path.removeprefix(root) if is_ours else "/"
    return get_console(request).pages.redirect(request, path, problem, "error")
