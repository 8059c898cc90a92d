"""Server-sent events, and answers that stop when nobody listens.

A stream ends with `[DONE]`, with an error event, or with a broken connection; never in silence, because the
official client takes a clean end for success.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, ClassVar, TypeVar

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.api.errors import unavailable
from shared.errors import ServiceError
from shared.queue import QueueUnavailable

log = structlog.get_logger()
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before the answer was there."""


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task, watcher})


class EventStream(Response):
    """Sends the events as they come, and pings in between. `events` is closed in any case.

    An exception of `events` becomes an error event; one of the connection breaks it.
    """

    media_type = "text/event-stream"
    ping_s: ClassVar[float] = 15.0  # of silence
    slow_client_s: ClassVar[float] = 30.0  # a client that does not read for so long is gone

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(headers=headers | {"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send_all(send))
        watcher = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            sender.cancel()
            watcher.cancel()
            await asyncio.wait({sender, watcher})
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._with_pings():
            async with asyncio.timeout(self.slow_client_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_pings(self) -> AsyncIterator[bytes]:
        while True:
            step = asyncio.ensure_future(anext(self._events))
            try:
                while not (await asyncio.wait({step}, timeout=self.ping_s))[0]:
                    yield PING
                yield step.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                yield event(failed(error).body())
                return
            finally:
                if not step.done():
                    step.cancel()
                    await asyncio.wait({step})


def failed(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, QueueUnavailable):
        return unavailable(error)
    log.error("stream_failed", exc_info=error)
    return ServiceError("The server had an error while processing the request.")
