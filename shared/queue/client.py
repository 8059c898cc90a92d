"""The API's side of the inference queue: enqueue, stream, cancel. One reader task serves all requests."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

import orjson
import redis.asyncio
import structlog
from pydantic import TypeAdapter, ValidationError
from redis.exceptions import RedisError

from shared.config import Settings
from shared.messages import Frame, GenerateRequest, WorkerStatus
from shared.queue.connection import KEY_PREFIX, Lane, script
from shared.queue.inbox import Diverged, FramesMissing, Inbox

log = structlog.get_logger(__name__)

LANE_OF: dict[str, Lane] = {"priority": "hi", "default": "std", "flex": "batch"}
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
MAX_PAYLOAD_BYTES = 1 << 20  # some 150,000 tokens
READ_BLOCK_MS = 1000
RETRY_S = 0.2
OUTAGE_S = 15.0  # how long running streams wait for Redis to come back
FRAMES = TypeAdapter(list[Frame])


class QueueFull(Exception):
    """The lane has no room; try again in a few seconds."""


class QueueUnavailable(Exception):
    """Redis cannot be reached, or does not accept writes."""


class RequestTooLarge(Exception):
    """The request does not fit the queue's bound on one entry."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What Redis knows of a request; see probe.lua."""

    state: Literal["queued", "running", "done", "lost", "gone"]
    news: Frame


class InferenceClient:
    """`api_id` must be new at every start of a process. Use as `async with`; then `enqueue` and `stream`."""

    def __init__(self, client: redis.asyncio.Redis, settings: Settings, api_id: str) -> None:
        self._client = client
        self._settings = settings
        self.api_id = api_id
        self._out_key = f"{KEY_PREFIX}out:{api_id}"
        self._last_id = "0-0"
        self._inboxes: dict[str, Inbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._down_since: float | None = None

    async def __aenter__(self) -> Self:
        self._spawn(self._read_forever())
        self._spawn(self._beat_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._tasks:  # Python 3.11's wait_for, inside the Redis client, may swallow a cancellation
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)
        with contextlib.suppress(RedisError):
            await self._client.delete(f"{KEY_PREFIX}api:{self.api_id}")  # workers drop what we still own

    @property
    def num_in_flight(self) -> int:
        return len(self._inboxes)

    async def enqueue(self, request: GenerateRequest) -> None:
        """Puts the request into its lane; a second call with the same request changes nothing.

        Consume it with `stream`, or `cancel` it. Raises QueueFull, QueueUnavailable, RequestTooLarge.
        """
        if not REQUEST_ID.fullmatch(request.request_id):
            raise ValueError(f"request id {request.request_id!r} is not of the form {REQUEST_ID.pattern}")
        if self._down_since is not None:
            raise QueueUnavailable("Redis is not reachable")
        inbox = self._inboxes.setdefault(request.request_id, Inbox(request))
        try:
            state, _ = await self._put(inbox, "new")
        except BaseException:
            self._forget(inbox)
            raise
        if state == "full":
            del self._inboxes[request.request_id]
            raise QueueFull(
                f"the {LANE_OF[request.service_tier]} lane holds {self._settings.max_queue_depth}"
            )

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Frame]:
        """Frames of an enqueued request: tokens contiguous and once, the last frame with `finish`.

        Leaving the iteration early cancels the request. When Redis stays away the last frame says so
        (error `queue_unavailable`).
        """
        inbox = self._inboxes[request.request_id]
        try:
            while not inbox.is_finished:
                frame = await self._next(inbox)
                if frame is not None:
                    yield frame
        finally:
            self._forget(inbox)

    def cancel(self, request_id: str) -> None:
        """Ends an enqueued request, if it still runs, and forgets it. Does not wait."""
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            self._forget(inbox)

    async def workers(self) -> list[WorkerStatus]:
        """Workers that reported within their time to live, with their ages as of now."""
        ttl_s = int(self._settings.worker_ttl_s) or 1
        try:
            found = await script("workers").run_async(self._client, ttl_s)
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        statuses = []
        for age_ms, text in found:
            status = WorkerStatus.model_validate_json(text)
            age_s = age_ms / 1000
            ages = {
                "progress_age_s": status.progress_age_s + age_s,
                "uptime_s": status.uptime_s + age_s,
            }
            statuses.append(status.model_copy(update=ages))
        return statuses

    async def _next(self, inbox: Inbox) -> Frame | None:
        try:
            async with asyncio.timeout(self._settings.owner_no_progress_s):
                frame = await inbox.take()
            return inbox.accept(frame)
        except (TimeoutError, FramesMissing):
            return await self._recover(inbox)
        except Diverged:
            log.warning("request_diverged", request_id=inbox.request.request_id, seq=len(inbox.tokens))
            _, attempt = await self._put(inbox, "restart")
            inbox.restart_at(attempt)
            return None

    async def _recover(self, inbox: Inbox) -> Frame | None:
        """Catches up from the log; an entry that no worker will ever see is put back."""
        if inbox.remaining_s == 0:
            return inbox.accept(inbox.failure("deadline_exceeded"))
        try:
            probe = await self._probe(inbox)
            if probe.state in ("lost", "gone"):
                log.warning("request_put_back", request_id=inbox.request.request_id, state=probe.state)
                _, attempt = await self._put(inbox, "force")
                inbox.min_attempt = min(inbox.min_attempt, attempt)  # a server that forgot counts anew
        except QueueUnavailable:
            await asyncio.sleep(RETRY_S)  # the reader task decides when waiting is over
            return None
        return inbox.accept(probe.news)

    async def _put(self, inbox: Inbox, mode: Literal["new", "force", "restart"]) -> tuple[str, int]:
        """Runs enqueue.lua; returns its (outcome, attempt)."""
        request, settings = inbox.request, self._settings
        payload = request.model_dump_json()
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise RequestTooLarge(f"the request takes {len(payload)} of {MAX_PAYLOAD_BYTES} bytes")
        deadline_ms = int(inbox.remaining_s * 1000)
        may_wait = mode == "new" and request.service_tier != "flex"
        wait_ms = int(settings.queue_wait_s * 1000) if may_wait else deadline_ms
        try:
            outcome, attempt = await script("enqueue").run_async(
                self._client,
                *(request.request_id, self.api_id, LANE_OF[request.service_tier], mode),
                *(settings.max_queue_depth, deadline_ms, wait_ms, int(settings.api_ttl_s * 1000)),
                *(request.tenant_id, orjson.dumps(inbox.tokens).decode(), payload),
            )
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        return outcome, attempt

    async def _probe(self, inbox: Inbox) -> Probe:
        rid, next_seq = inbox.request.request_id, len(inbox.tokens)
        try:
            reply = await script("probe").run_async(self._client, rid, next_seq)
        except RedisError as error:
            raise QueueUnavailable(str(error)) from error
        state, attempt, finish, error_code, meta, tokens, logprobs = reply
        news = {
            "request_id": rid,
            "attempt": attempt,
            "from_seq": next_seq,
            "tokens": tuple(map(int, tokens)),
            "finish": finish or None,
            "error": error_code or None,
            "logprobs": tuple(orjson.loads(text) for text in logprobs) or None,
            "meta": orjson.loads(meta) if meta else None,
        }
        return Probe(state, Frame.model_validate(news))

    def _forget(self, inbox: Inbox) -> None:
        if self._inboxes.pop(inbox.request.request_id, None) is not None and not inbox.is_finished:
            self._spawn(self._send_cancel(inbox.request.request_id))

    async def _send_cancel(self, request_id: str) -> None:
        # a lost cancel costs only the rest of this request's tokens
        with contextlib.suppress(RedisError):
            await script("cancel").run_async(self._client, request_id)

    async def _read_forever(self) -> None:
        while True:
            try:
                if self._down_since is not None:
                    await self._client.ping()
                    self._down_since = None
                await self._read_once()
            except (RedisError, OSError) as error:
                self._note_outage(error)
                await asyncio.sleep(RETRY_S)

    async def _read_once(self) -> None:
        reply = await self._client.xread({self._out_key: self._last_id}, count=200, block=READ_BLOCK_MS)
        for _, entries in cast(Any, reply) or ():
            for entry_id, fields in entries:
                self._last_id = entry_id
                self._dispatch(fields["f"])

    def _dispatch(self, text: str) -> None:
        try:
            frames = FRAMES.validate_json(text)
        except ValidationError:  # of an incompatible peer; the owners' timers read the log
            log.error("bad_frames", size_bytes=len(text))
            return
        for frame in frames:
            inbox = self._inboxes.get(frame.request_id)
            if inbox is not None:
                inbox.offer(frame)

    def _note_outage(self, error: Exception) -> None:
        now = time.monotonic()
        if self._down_since is None:
            self._down_since = now
            log.warning("redis_unreachable", error=type(error).__name__)
        elif now - self._down_since > OUTAGE_S:
            for inbox in self._inboxes.values():
                seq = len(inbox.tokens)
                lost = Frame(request_id=inbox.request.request_id, from_seq=seq, finish="error")
                inbox.offer(
                    lost.model_copy(update={"attempt": inbox.min_attempt, "error": "queue_unavailable"})
                )

    async def _beat_forever(self) -> None:
        """Keeps this process alive for the workers, and its stream short."""
        ttl_ms = int(self._settings.api_ttl_s * 1000)
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self._client.set(f"{KEY_PREFIX}api:{self.api_id}", 1, px=ttl_ms)
                await self._client.xtrim(self._out_key, minid=self._last_id)
            await asyncio.sleep(ttl_ms / 3000)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
