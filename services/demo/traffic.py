"""The load: other customers' chat requests, and the worker's counters beside them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from openai import AsyncOpenAI

from services.demo.record import Completed, Record, Sample
from shared.config import Settings
from shared.queue import InferenceClient, QueueUnavailable, open_async_redis

SEED = 7
REQUESTS_PER_S = 0.6
OUTPUT_TOKENS = 48
PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "What is the difference between a list and a tuple in Python?",
    "Suggest a name for a small bakery.",
    "Why is the sky blue?",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish, German and Italian.",
    "What causes the seasons?",
    "Write a polite reminder about an unpaid invoice.",
)


class Traffic:
    """Chat requests of other customers: Poisson arrivals, streamed answers."""

    def __init__(self, client: AsyncOpenAI, model: str, record: Record) -> None:
        self._client = client
        self._model = model
        self._record = record
        self._random = random.Random(SEED)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Requests arrive inside the block; it ends when the last of them is answered."""
        arrivals = asyncio.create_task(self._arrive())
        try:
            yield
        finally:
            arrivals.cancel()
            await asyncio.gather(*self._tasks)

    async def _arrive(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(REQUESTS_PER_S))
            task = asyncio.create_task(self._ask(self._random.choice(PROMPTS)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, prompt: str) -> None:
        started = time.monotonic()
        times: list[float] = []
        num_tokens = 0
        try:
            stream = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=OUTPUT_TOKENS,
                temperature=0.7,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    times.append(time.monotonic())
                if chunk.usage:
                    num_tokens = chunk.usage.completion_tokens
        except Exception as error:  # whatever it is, the customer was not served
            self._record.failed.append(f"{type(error).__name__}: {error}")
            return
        if times:
            tpot_ms = (times[-1] - times[0]) * 1000 / max(1, num_tokens - 1)
            self._record.completed.append(Completed(times[-1], times[0] - started, tpot_ms, num_tokens))


async def watch_worker(settings: Settings, record: Record) -> None:
    """Samples the workers' counters as they report them."""
    async with open_async_redis(settings.redis_url) as redis:
        client = InferenceClient(redis, settings, "demo")
        while True:
            try:
                workers = await client.workers()
            except QueueUnavailable:
                workers = []
            if workers:
                inference = sum(worker.inference_tokens for worker in workers)
                finetune = sum(worker.finetune_tokens for worker in workers)
                record.samples.append(Sample(time.monotonic(), inference, finetune))
            await asyncio.sleep(settings.beat_s)
