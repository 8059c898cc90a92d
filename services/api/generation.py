"""From sequences on the queue to text: tokens become words, stop strings end them, whatever is left is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import structlog

from services.api.errors import DeadlineError, GenerationError, OverloadedError
from shared.detokenizer import StopScanner
from shared.errors import InvalidRequestError, ServiceError
from shared.messages import Frame, GenerateRequest, RequestMeta, TokenLogprob
from shared.queue import InferenceClient
from shared.tokenizer import ChatTokenizer

log = structlog.get_logger()
BUFFERED_DELTAS = 16  # of all choices together; a slow client slows its own requests only


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `text` is final; its tokens may have come earlier, while it was held back."""

    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    meta: RequestMeta | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.logprobs or self.finish_reason or self.meta)


class Choice:
    """One sequence on its way to text."""

    def __init__(
        self, index: int, request: GenerateRequest, tokenizer: ChatTokenizer, stops: Sequence[str]
    ) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = tokenizer.detokenizer(request.prompt)
        self._scanner = StopScanner(stops)

    def accept(self, frame: Frame) -> Delta:
        """Raises ServiceError where the frame says that the request failed."""
        if frame.finish in ("error", "cancelled"):
            raise failure(frame.error)
        text, num_used = "", 0
        for token in frame.tokens:
            text += self._scanner.push(self._detokenizer.push([token]))
            num_used += 1
            if self._scanner.is_stopped:
                break
        if frame.finish is not None and not self._scanner.is_stopped:
            text += self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()
        self.finish_reason = "stop" if self._scanner.is_stopped else frame.finish
        self.num_tokens += num_used
        if frame.meta is not None:
            self.cached_tokens = frame.meta.cached_tokens
        return Delta(
            index=self.index,
            text=text,
            tokens=frame.tokens[:num_used],
            logprobs=(frame.logprobs or ())[:num_used],
            finish_reason=self.finish_reason,
            meta=frame.meta,
        )


def failure(code: str | None) -> ServiceError:
    """What a worker's error code means to the client."""
    match code:
        case "queue_timeout":
            return OverloadedError("The server is at capacity: no worker took the request in time.")
        case "queue_unavailable":
            return OverloadedError("The queue is not available.", code="queue_unavailable")
        case "adapter_load_failed":
            return OverloadedError("The adapter could not be loaded.", code="adapter_load_failed")
        case "deadline_exceeded":
            return DeadlineError("The request took longer than its deadline.")
        case "invalid_request":
            return InvalidRequestError("The engine cannot serve this request.")
        case "poisoned":
            return GenerationError("The request stopped several workers.", code="request_poisoned")
        case _:
            return GenerationError("The request was ended by the server.")


@dataclass(slots=True)
class Generation:
    """All choices of one API request. Use `start`, then iterate `deltas`, and `close` in any case."""

    queue: InferenceClient
    choices: list[Choice]
    _deltas: asyncio.Queue[Delta | ServiceError | None] = field(
        default_factory=lambda: asyncio.Queue(BUFFERED_DELTAS)
    )
    _pumps: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Enqueues every choice, or none. Raises QueueFull, QueueUnavailable."""
        try:
            for choice in self.choices:
                await self.queue.enqueue(choice.request)
        except BaseException:
            self.close()
            raise
        self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    async def deltas(self) -> AsyncIterator[Delta]:
        """News of all choices as they come, until each has its finish reason. Raises ServiceError."""
        num_open = len(self.choices)
        while num_open:
            delta = await self._deltas.get()
            if isinstance(delta, ServiceError):
                raise delta
            if delta is None:
                num_open -= 1
            elif not delta.is_empty:
                yield delta

    def close(self) -> None:
        """Cancels what still runs. Does not wait."""
        for pump in self._pumps:
            pump.cancel()
        for choice in self.choices:
            self.queue.cancel(choice.request.request_id)

    async def _pump(self, choice: Choice) -> None:
        stream = self.queue.stream(choice.request)
        try:
            async for frame in stream:
                delta = choice.accept(frame)
                await self._deltas.put(delta)
                if delta.finish_reason is not None:
                    break
            await self._deltas.put(None)
        except ServiceError as error:
            await self._deltas.put(error)
        except Exception:
            log.exception("generation_failed", request_id=choice.request.request_id)
            await self._deltas.put(failure(None))
        finally:
            self.queue.cancel(choice.request.request_id)  # a stop string ends it before the worker does
