"""Every error of the API in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import random
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from shared.errors import InvalidRequestError, LimitExceededError, NotFoundError, ServiceError
from shared.queue import QueueFull, QueueUnavailable, RequestTooLarge

log = structlog.get_logger()

MAX_NAMED_CHARS = 200  # of a customer's own words that an error repeats


class PayloadTooLargeError(ServiceError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaTypeError(ServiceError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class OverloadedError(ServiceError):
    """Nothing is wrong with the request; the same one may succeed in a few seconds."""

    status = 503
    code = "server_is_overloaded"


class DeadlineError(ServiceError):
    status = 504
    code = "deadline_exceeded"


class GenerationError(ServiceError):
    """The worker gave the request up; sending it again will not help."""

    status = 500
    code = "generation_failed"


NOT_WORTH_RETRYING: tuple[type[ServiceError], ...] = (GenerationError, DeadlineError)
RETRY_SOON: tuple[type[ServiceError], ...] = (OverloadedError, LimitExceededError)
MAX_WAIT_S = 5.0


def retry_headers(error: ServiceError) -> dict[str, str]:
    """What the official client obeys. The wait has jitter: those refused together do not return together."""
    if isinstance(error, NOT_WORTH_RETRYING):
        return {"x-should-retry": "false"}
    if isinstance(error, RETRY_SOON):
        wait_s = random.uniform(1.0, MAX_WAIT_S)
        return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(round(wait_s * 1000))}
    return {}


def error_response(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=retry_headers(error))


def invalid_field(error: ValidationError, body: dict[str, Any]) -> InvalidRequestError:
    """What is wrong with a body, by the name of its field.

    Where a field may be one of several things, the error that looked deepest into it speaks.
    """
    found = error.errors(include_url=False, include_input=False)
    paths = [path_in(body, location_of(each), each["type"]) for each in found]
    deepest = max(paths, key=len)
    param = ".".join(map(str, deepest))[:MAX_NAMED_CHARS]
    here = [each for each, path in zip(found, paths, strict=True) if path == deepest]
    if here[0]["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
        return InvalidRequestError(message, param=param, code="unknown_parameter")
    if here[0]["type"] == "none_required":
        message = f"{param} is not supported"
        return InvalidRequestError(message, param=param, code="unsupported_parameter")
    words = "; or ".join(dict.fromkeys(words_of(each) for each in here))
    return InvalidRequestError(f"{param or 'request body'}: {words}", param=param or None)


def location_of(error: ErrorDetails) -> tuple[int | str, ...]:
    """Where it says what an object is, for an object that says nothing known."""
    if error["type"] != "union_tag_invalid":
        return error["loc"]
    return (*error["loc"], error["ctx"]["discriminator"].strip("'"))


def words_of(error: ErrorDetails) -> str:
    if error["type"] == "union_tag_invalid":
        return f"Input should be one of {error['ctx']['expected_tags']}"
    return error["msg"].removeprefix("Value error, ")


def path_in(body: Any, location: tuple[int | str, ...], kind: str) -> tuple[int | str, ...]:
    """The steps of an error's location that lead through the body; the others name members of a union."""
    path: list[int | str] = []
    for number, step in enumerate(location):
        is_key = isinstance(body, dict) and step in body
        is_index = isinstance(body, list) and isinstance(step, int) and step < len(body)
        if is_key or is_index:
            body = body[step]
            path.append(step)
        elif kind == "missing" and number == len(location) - 1:
            path.append(step)
    return tuple(path)


def unavailable(error: Exception) -> OverloadedError:
    """The refusal for a part of ours that does not answer."""
    if isinstance(error, QueueFull):
        return OverloadedError("The server is at capacity; try again shortly.")
    if isinstance(error, QueueUnavailable):
        return OverloadedError("The queue is not available; try again shortly.", code="queue_unavailable")
    return OverloadedError("The database is not available; try again shortly.", code="database_unavailable")


def unroutable(status: int, request: Request) -> ServiceError:
    """No such route, or not with this method."""
    if status == 405:
        return InvalidRequestError(f"Not allowed method {request.method}", code="method_not_allowed")
    url = request.url.path[:MAX_NAMED_CHARS]
    return NotFoundError(f"Unknown request URL: {request.method} {url}", code="unknown_url")


def install(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(InvalidRequestError(f"{param or 'request'}: {first['msg']}", param=param))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(unroutable(error.status_code, request))
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(DataError)
    async def unstorable(request: Request, error: DataError) -> JSONResponse:
        return error_response(
            InvalidRequestError("A text holds a character that cannot be stored, such as NUL.")
        )

    @app.exception_handler(RequestTooLarge)
    async def too_large(request: Request, error: RequestTooLarge) -> JSONResponse:
        return error_response(ContextLengthError("The request is larger than the queue takes."))

    @app.exception_handler(QueueFull)
    @app.exception_handler(QueueUnavailable)
    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeoutError)
    async def dependency_down(request: Request, error: Exception) -> JSONResponse:
        log.warning("dependency_unavailable", path=request.url.path, error=type(error).__name__)
        return error_response(unavailable(error))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", path=request.url.path, exc_info=error)
        response = error_response(ServiceError("The server had an error; it has been logged."))
        response.headers["x-request-id"] = request.scope.get("request_id", "")
        return response
