"""The frames of one request on their way to its handler, put in order. Pure: knows no Redis."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from shared.messages import Frame, GenerateRequest

MAX_WAITING_FRAMES = 64  # a slow reader beyond this reads from the token log instead


class FramesMissing(Exception):
    """Tokens between what the handler has and the frame at hand went by; the log has them."""


class Diverged(Exception):
    """A resumed worker computed other tokens than the handler has given away already."""


@dataclass(slots=True)
class Inbox:
    request: GenerateRequest
    frames: asyncio.Queue[Frame] = field(default_factory=lambda: asyncio.Queue(MAX_WAITING_FRAMES))
    tokens: list[int] = field(default_factory=list)  # given to the handler, all of them
    has_meta: bool = False
    is_finished: bool = False
    min_attempt: int = 0  # frames of earlier attempts continue tokens that were replaced
    overflowed: bool = False
    made_at: float = field(default_factory=time.monotonic)

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.request.deadline_s - (time.monotonic() - self.made_at))

    def offer(self, frame: Frame) -> None:
        """From the reader task. Never waits: one slow client holds up nobody."""
        if frame.attempt < self.min_attempt:
            return
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.overflowed = True

    async def take(self) -> Frame:
        if self.overflowed and self.frames.empty():
            self.overflowed = False
            raise FramesMissing
        return await self.frames.get()

    def failure(self, error: str) -> Frame:
        """A terminal that this process makes itself."""
        return Frame(
            request_id=self.request.request_id,
            attempt=self.min_attempt,
            from_seq=len(self.tokens),
            finish="error",
            error=error,
        )

    def restart_at(self, attempt: int) -> None:
        """Everything before this attempt is void."""
        self.min_attempt = attempt
        while not self.frames.empty():
            self.frames.get_nowait()

    def accept(self, frame: Frame) -> Frame | None:
        """The frame's news: tokens that continue ours, meta, finish. None when there are none."""
        if frame.attempt < self.min_attempt or self.is_finished:
            return None
        overlap = len(self.tokens) - frame.from_seq
        if overlap < 0:
            raise FramesMissing
        known = self.tokens[frame.from_seq : frame.from_seq + len(frame.tokens)]
        if tuple(known) != frame.tokens[: len(known)]:
            raise Diverged
        news = frame.model_copy(
            update={
                "from_seq": len(self.tokens),
                "tokens": frame.tokens[overlap:],
                "logprobs": frame.logprobs[overlap:] if frame.logprobs else None,
                "meta": None if self.has_meta else frame.meta,
            }
        )
        self.tokens += news.tokens
        self.has_meta |= news.meta is not None
        self.is_finished = news.finish is not None
        return news if news.tokens or news.meta or news.finish else None
