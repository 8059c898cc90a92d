"""Every error in one shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from shared.errors import InvalidRequestError, ServiceError

log = structlog.get_logger()


def install(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        refusal = InvalidRequestError(f"{param or 'the request'}: {first['msg']}", param=param)
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), "invalid_request_error", "not_found")

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeoutError)
    async def no_database(request: Request, error: Exception) -> JSONResponse:
        log.warning("database_unavailable", path=request.url.path, error=type(error).__name__)
        words = "the database is not available or busy; try again"
        response = answer(503, words, "server_error", "database_unavailable")
        response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.exception("request_failed", path=request.url.path)
        return answer(500, "an error on our side", "server_error", "internal_error")


def answer(status: int, message: str, kind: str, code: str) -> JSONResponse:
    body = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": body}, status)
