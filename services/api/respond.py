"""Runs an inference request and answers it, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import orjson
from fastapi import Request
from starlette.responses import Response

from services.api.generation import Delta
from services.api.inference import Run
from services.api.streaming import CLIENT_CLOSED, ClientGone, EventStream, unless_client_leaves


class Format(Protocol):
    """How deltas become an answer."""

    async def collect(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]: ...

    def stream(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]: ...


async def respond(request: Request, run: Run, answer: Format, *, is_stream: bool) -> Response:
    """A stream's status is sent with its first news, so that what fails before has a status of its own."""
    headers = run.order.target.headers
    await run.start()
    deltas = run.deltas()
    try:
        if is_stream:
            first = await unless_client_leaves(request, anext(deltas))
            return EventStream(answer.stream(resumed(first, deltas)), headers)
        body = await unless_client_leaves(request, answer.collect(deltas))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        if not is_stream:
            await deltas.aclose()
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


async def resumed(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    try:
        yield first
        async for delta in rest:
            yield delta
    finally:
        await rest.aclose()
