"""The finetune queue: job ids only. The truth about a job is its row; an entry only says "look at this one".

Entries may repeat or be lost: the claim of a job is fenced in its row, and a sweeper sends again what waits.
"""

from __future__ import annotations

from typing import Any, cast

import redis
import redis.asyncio
from redis.exceptions import ResponseError

from shared.config import Settings
from shared.queue.connection import GROUP, script

STREAM = "fx:{ft}:q"


class FinetuneSender:
    """For an event loop: tells the workers that a job is ready."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client

    async def send(self, job_id: str) -> None:
        await script("finetune_send").run_async(self._client, job_id)


class FinetuneQueue:
    """For a worker's thread, and for senders without an event loop (`worker_id` may then be empty)."""

    def __init__(self, client: redis.Redis, settings: Settings, worker_id: str = "") -> None:
        self._client = client
        self._settings = settings
        self._worker_id = worker_id

    def send(self, job_id: str) -> None:
        script("finetune_send").run(self._client, job_id)

    def take(self) -> tuple[str, str] | None:
        """The next (entry id, job id), or None; never waits. Acknowledge it once the claim was answered.

        Entries that a worker took and did not acknowledge within the lease come first.
        """
        try:
            return self._reap() or self._pull()
        except ResponseError as error:
            if "NOGROUP" in str(error):  # nothing was ever sent, or Redis was emptied; `send` makes the group
                return None
            raise

    def ack(self, entry_id: str) -> None:
        self._client.xack(STREAM, GROUP, entry_id)
        self._client.xdel(STREAM, entry_id)

    def _reap(self) -> tuple[str, str] | None:
        lease_ms = int(self._settings.lease_s * 1000)
        reply = self._client.xautoclaim(STREAM, GROUP, self._worker_id, lease_ms, count=1)
        return first_entry(cast(Any, reply)[1])

    def _pull(self) -> tuple[str, str] | None:
        reply = self._client.xreadgroup(GROUP, self._worker_id, {STREAM: ">"}, count=1)
        return first_entry(cast(Any, reply)[0][1]) if reply else None


def first_entry(entries: list[tuple[str, dict[str, str]]]) -> tuple[str, str] | None:
    for entry_id, fields in entries:
        return entry_id, fields["job_id"]
    return None
