"""Connections to Redis, and the Lua scripts that are the queue protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

KEY_PREFIX = "fx:{inf}:"
GROUP = "w"
Lane = Literal["hi", "std", "batch"]
LANES: tuple[Lane, ...] = ("hi", "std", "batch")
ScriptName = Literal[
    "enqueue", "take", "emit", "beat", "release", "retire", "cancel", "probe", "workers", "finetune_send"
]
Argument = str | int | float


def open_redis(url: str) -> redis.Redis:
    """A client for a worker's thread: text in, text out, every wait bounded, one quick second try."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_connect_timeout=2,
        socket_timeout=5,
        retry=Retry(ConstantBackoff(0.05), 1),
    )


def open_async_redis(url: str) -> redis.asyncio.Redis:
    """The same for an event loop."""
    return redis.asyncio.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_connect_timeout=1,
        socket_timeout=3,
        retry=AsyncRetry(ConstantBackoff(0.05), 1),
    )


class Script:
    """One Lua script; the server keeps it by its hash, and is told again after it forgot."""

    def __init__(self, name: ScriptName) -> None:
        lua = files("shared.queue") / "lua"
        self.text = (lua / "prelude.lua").read_text() + (lua / f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: redis.Redis, *args: Argument) -> Any:
        try:
            return client.evalsha(self.sha, 1, KEY_PREFIX, *args)
        except NoScriptError:
            return client.eval(self.text, 1, KEY_PREFIX, *args)

    async def run_async(self, client: redis.asyncio.Redis, *args: Argument) -> Any:
        try:
            return await cast(Any, client.evalsha(self.sha, 1, KEY_PREFIX, *args))
        except NoScriptError:
            return await cast(Any, client.eval(self.text, 1, KEY_PREFIX, *args))

    def run_many(self, client: redis.Redis, calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """All calls in one round trip."""
        if len(calls) == 1:
            return [self.run(client, *calls[0])]
        pipeline = client.pipeline(transaction=False)
        for args in calls:
            pipeline.evalsha(self.sha, 1, KEY_PREFIX, *args)
        replies = pipeline.execute(raise_on_error=False)
        for i, reply in enumerate(replies):
            if isinstance(reply, NoScriptError):
                replies[i] = self.run(client, *calls[i])
            elif isinstance(reply, Exception):
                raise reply
        return list(replies)


@cache
def script(name: ScriptName) -> Script:
    """Read from the package once a process."""
    return Script(name)
