"""One inference request of the API: its sequences on the queue, its text, its bill."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

from services.api.adapters import Target
from services.api.generation import Choice, Delta, Generation
from services.api.model import cache_salt
from services.api.schemas.fields import SEED_RANGE, ServiceTier
from services.api.state import ApiState
from shared.keys import KeyOwner
from shared.messages import GenerateRequest, SamplingParams
from shared.service_levels import Tier
from shared.usage import InferenceUsage


@dataclass(frozen=True, slots=True)
class Order:
    """What to generate: `num_choices` continuations of each prompt."""

    kind: Literal["chatcmpl", "cmpl"]
    target: Target
    prompts: list[list[int]]
    sampling: SamplingParams
    num_choices: int = 1
    stops: list[str] = field(default_factory=list)
    tier: Tier = "default"


class Run:
    """Iterate `deltas`; closing that iteration, early or not, releases everything and writes the bill."""

    def __init__(self, state: ApiState, owner: KeyOwner, order: Order) -> None:
        self.id = f"{order.kind}-{secrets.token_hex(14)}"
        self.created = int(time.time())
        self.order = order
        self.choices = make_choices(state, owner, order, self.id)
        self._state = state
        self._owner = owner
        self._generation = Generation(state.queue, self.choices)
        self._started_at = time.monotonic()
        self._first_at: float | None = None

    async def start(self) -> None:
        """Raises LimitExceededError, OverloadedError, QueueFull, QueueUnavailable."""
        await self._state.require_worker()
        self._state.limit.acquire(self._owner.tenant_id, len(self.choices))
        self._state.metrics.in_flight.inc(len(self.choices))
        try:
            await self._generation.start()
        except BaseException:
            self._release()
            raise

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        bill: asyncio.Task[None] | None = None
        try:
            async for delta in self._generation.deltas():
                self._first_at = self._first_at or time.monotonic()
                yield delta
        finally:
            self._release()
            if self._first_at is not None:
                # not awaited here: a client that has left cancels us, and the bill is due all the same
                bill = self._state.background.spawn(self._state.usage.record(self._bill()))
        if bill is not None:
            await bill

    def usage(self) -> dict[str, Any]:
        """As the API reports it: each prompt counts once."""
        prompt_tokens = sum(map(len, self.order.prompts))
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens(), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def _cached_tokens(self) -> int:
        return sum(choice.cached_tokens for choice in self.choices[:: self.order.num_choices])

    def _release(self) -> None:
        self._generation.close()
        self._state.limit.release(self._owner.tenant_id, len(self.choices))
        self._state.metrics.in_flight.dec(len(self.choices))
        self._observe()

    def _observe(self) -> None:
        metrics, tier, now = self._state.metrics, self.order.tier, time.monotonic()
        metrics.inference_requests.labels(tier).inc()
        num_tokens = sum(choice.num_tokens for choice in self.choices)
        metrics.prompt_tokens.inc(sum(map(len, self.order.prompts)))
        metrics.cached_tokens.inc(self._cached_tokens())
        metrics.completion_tokens.inc(num_tokens)
        if self._first_at is not None:
            metrics.first_token_s.labels(tier).observe(self._first_at - self._started_at)
            per_choice = num_tokens / len(self.choices)
            if per_choice > 1:
                metrics.token_s.labels(tier).observe((now - self._first_at) / (per_choice - 1))

    def _bill(self) -> InferenceUsage:
        target = self.order.target
        return InferenceUsage(
            request_id=self.id,
            tenant_id=self._owner.tenant_id,
            key_id=self._owner.key_id,
            model=target.model,
            version_id=target.adapter.version_id if target.adapter else None,
            prompt_tokens=sum(map(len, self.order.prompts)),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=self._cached_tokens(),
        )


def make_choices(state: ApiState, owner: KeyOwner, order: Order, run_id: str) -> list[Choice]:
    """Prompt by prompt; each choice draws from a seed of its own."""
    salt = cache_salt(state.settings.key_pepper, owner.tenant_id)
    choices = []
    for index in range(len(order.prompts) * order.num_choices):
        seed = (order.sampling.seed + index) % SEED_RANGE
        request = GenerateRequest(
            request_id=f"{run_id}-{index}",
            tenant_id=owner.tenant_id,
            prompt=tuple(order.prompts[index // order.num_choices]),
            sampling=order.sampling.model_copy(update={"seed": seed}),
            adapter=order.target.adapter,
            cache_salt=salt,
            service_tier=order.tier,
            deadline_s=state.settings.request_deadline_s,
        )
        choices.append(Choice(index, request, state.base.tokenizer, order.stops))
    return choices


def tier_of(asked: ServiceTier | None) -> Tier:
    """The tier that serves a request: `auto` leaves it to us, and nobody has bought a `scale` of their own."""
    return asked if asked == "priority" or asked == "flex" else "default"
