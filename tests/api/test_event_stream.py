"""Server-sent events at the level of ASGI: what is sent, when, and what happens when nobody takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from services.api.streaming import DONE, PING, EventStream
from shared.errors import InvalidRequestError


class QuickStream(EventStream):
    ping_s = 0.05
    slow_client_s = 0.05


class Client:
    """The other end of the connection. It leaves after `leaves_after` chunks, or stops reading."""

    def __init__(self, leaves_after: int | None = None, reads: bool = True) -> None:
        self.received: list[bytes] = []
        self.is_complete = False
        self.has_left = asyncio.Event()
        self.leaves_after = leaves_after
        self.reads = reads

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.headers = dict(message["headers"])
            return
        if not self.reads:
            await asyncio.sleep(60)
        if message["body"]:
            self.received.append(message["body"])
        self.is_complete = not message["more_body"]
        if len(self.received) == self.leaves_after:
            self.has_left.set()

    async def receive(self) -> dict:
        await self.has_left.wait()
        return {"type": "http.disconnect"}


class Source:
    """Events at a pace; remembers that it was closed."""

    def __init__(self, *events: bytes, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self.events, self.pause_s, self.error = events, pause_s, error
        self.is_closed = False

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self.events:
                await asyncio.sleep(self.pause_s)
                yield event
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0)
            self.is_closed = True


async def serve(source: Source, client: Client) -> None:
    await QuickStream(source.stream(), {"x-a": "b"})({}, client.receive, client.send)


async def test_events_are_sent_as_they_are() -> None:
    source, client = Source(b"data: 1\n\n", DONE), Client()
    await serve(source, client)
    assert client.received == [b"data: 1\n\n", DONE]
    assert client.is_complete
    assert source.is_closed
    assert client.headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in client.headers
    assert client.headers[b"x-a"] == b"b"


async def test_silence_is_filled_with_comments() -> None:
    source, client = Source(DONE, pause_s=0.2), Client()
    await serve(source, client)
    assert client.received[0] == PING
    assert client.received[-1] == DONE


async def test_an_error_ends_the_stream_with_an_event_and_without_done() -> None:
    source, client = Source(b"data: 1\n\n", error=InvalidRequestError("no", code="c")), Client()
    await serve(source, client)
    assert client.received[1].startswith(b'data: {"error":{"message":"no"')
    assert len(client.received) == 2
    assert source.is_closed


async def test_an_accident_says_nothing_of_its_cause() -> None:
    source, client = Source(error=RuntimeError("a secret")), Client()
    await serve(source, client)
    assert b"server_error" in client.received[0]
    assert b"secret" not in client.received[0]


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
async def test_a_client_that_leaves_closes_the_source(pause_s: float) -> None:
    source, client = Source(*[b"data: 1\n\n"] * 1000, pause_s=pause_s), Client(leaves_after=3)
    await asyncio.wait_for(serve(source, client), 5)
    assert source.is_closed
    assert len(client.received) < 1000
    assert not client.is_complete


async def test_a_client_that_does_not_read_breaks_the_connection() -> None:
    """An exception is what makes the server cut the connection; a clean end would look like success."""
    source, client = Source(b"data: 1\n\n"), Client(reads=False)
    with pytest.raises(TimeoutError):
        await serve(source, client)
    assert source.is_closed
    assert not client.is_complete
