"""Connects the inference queue to the engine: requests in, tokens out, every effect fenced."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import redis
import structlog

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import TokenEvent
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Logprob, Sampling
from services.gpu_worker.model.peft import InvalidAdapter
from services.gpu_worker.store_client import CorruptObject, StoreClient, StoreUnavailable
from shared.config import Settings
from shared.messages import FinishReason, GenerateRequest, RequestMeta, TokenLogprob, WorkerStatus
from shared.queue import Claimed, Emission, InferenceWorkerQueue

log = structlog.get_logger()
ASK_S = 0.3  # how often a request without new tokens asks whether it is still wanted
RETRY_S = 0.2


@dataclass(slots=True, eq=False)
class Flight:
    """One request in our hands. `tokens` are all of its output, those of an earlier worker included."""

    claimed: Claimed
    arrival_s: float  # at the queue
    tokens: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    asked_s: float = 0.0
    finished: bool = False
    adapter_files: Future[dict[str, bytes]] | None = None


class Emitter(threading.Thread):
    """Publishes emissions in order while the engine computes the next step; keeps trying while Redis is away."""

    def __init__(self, requests: InferenceWorkerQueue) -> None:
        super().__init__(name="emitter", daemon=True)
        self._requests = requests
        self._outbox: queue.SimpleQueue[list[Emission] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Emission, str]] = queue.SimpleQueue()
        self.num_pending = 0

    def send(self, emissions: list[Emission]) -> None:
        if emissions:
            self.num_pending += 1
            self._outbox.put(emissions)

    def run(self) -> None:
        while (emissions := self._outbox.get()) is not None:
            for emission, answer in zip(emissions, self._emit(emissions), strict=True):
                self.answers.put((emission, answer))
            self.num_pending -= 1

    def _emit(self, emissions: list[Emission]) -> list[str]:
        while True:
            try:
                return self._requests.emit(emissions)
            except redis.RedisError as error:
                log.warning("emit_failed", error=str(error), waiting=self.num_pending)
                time.sleep(RETRY_S)

    def stop(self, timeout_s: float) -> None:
        self._outbox.put(None)
        self.join(timeout_s)


class InferenceLink:
    """Owned by the worker's main thread; only emissions and adapter downloads happen beside it."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        requests: InferenceWorkerQueue,
        store: StoreClient,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._requests = requests
        self._store = store
        self._pool = pool
        self._flights: dict[str, Flight] = {}
        self._emitter = Emitter(requests)
        self._emitter.start()

    @property
    def num_flights(self) -> int:
        return len(self._flights)

    @property
    def is_quiet(self) -> bool:
        """Nothing in flight and nothing left to publish."""
        return not self._flights and not self._emitter.num_pending

    # --- in

    def take(self) -> None:
        """Claims as many requests as there are free places."""
        free = self._settings.max_num_seqs - len(self._flights)
        try:
            for claimed in self._requests.take(free):
                self._start(claimed)
        except redis.RedisError as error:
            log.warning("take_failed", error=str(error))
            time.sleep(RETRY_S)

    def wait(self, timeout_s: float) -> None:
        try:
            self._requests.wait(timeout_s)
        except redis.RedisError:
            time.sleep(timeout_s)

    def _start(self, claimed: Claimed) -> None:
        request = claimed.request
        if claimed.request_id in self._flights:
            self._drop(claimed.request_id)
        flight = Flight(claimed, time.monotonic() - claimed.waited_s, list(claimed.emitted_tokens))
        self._flights[claimed.request_id] = flight
        if request.adapter is not None and request.adapter.digest not in self._engine.adapters:
            flight.adapter_files = self._pool.submit(self._store.read_adapter, request.adapter)
        else:
            self._add(flight)

    def _add(self, flight: Flight) -> None:
        request = flight.claimed.request
        if request.sampling.max_tokens and len(flight.tokens) >= request.sampling.max_tokens:
            self._finish(flight, "length")  # the worker before us died between the last token and the end
            return
        try:
            self._engine.add(
                request.request_id,
                list(request.prompt),
                engine_sampling(request, self._engine.model.config.eos_token_ids),
                emitted=flight.tokens,
                adapter=request.adapter.digest if request.adapter else None,
                cache_salt=request.cache_salt,
                tier=request.service_tier,
                waited_s=time.monotonic() - flight.arrival_s,
            )
        except InvalidRequest as error:
            log.info("request_refused", request=request.request_id, error=str(error))
            self._finish(flight, "error", "invalid_request")

    def advance(self) -> None:
        """What is due between two steps: adapters that arrived, answers to emissions, deadlines, questions."""
        now = time.monotonic()
        while not self._emitter.answers.empty():
            self._heed(*self._emitter.answers.get())
        questions = []
        for flight in list(self._flights.values()):
            if flight.adapter_files is not None and flight.adapter_files.done():
                self._load_adapter(flight)
            elif now - flight.arrival_s > flight.claimed.request.deadline_s and not flight.finished:
                self._engine.abort(flight.claimed.request_id)
                self._finish(flight, "error", "deadline_exceeded")
            elif now - flight.asked_s > ASK_S and not flight.finished:
                flight.asked_s = now
                questions.append(Emission(flight.claimed, len(flight.tokens)))
        self._emitter.send(questions)

    def _load_adapter(self, flight: Flight) -> None:
        future, flight.adapter_files = flight.adapter_files, None
        adapter = flight.claimed.request.adapter
        assert future is not None and adapter is not None
        try:
            self._engine.load_adapter(adapter.digest, future.result())
        except (CorruptObject, StoreUnavailable, InvalidAdapter, InvalidRequest) as error:
            log.error("adapter_load_failed", version=adapter.version_id, error=str(error))
            self._finish(flight, "error", "adapter_load_failed")
        else:
            self._add(flight)

    def _heed(self, emission: Emission, answer: str) -> None:
        flight = self._flights.get(emission.claimed.request_id)
        if flight is None or flight.claimed is not emission.claimed:
            return
        if answer in ("stale", "cancel"):
            self._drop(emission.claimed.request_id)
        elif answer.startswith("behind:"):
            self._send_again(flight, emission, int(answer.removeprefix("behind:")))
        elif emission.finish is not None:
            del self._flights[emission.claimed.request_id]

    def _send_again(self, flight: Flight, emission: Emission, start: int) -> None:
        """The log lost its tail: everything from `start` on, which includes what `emission` held."""
        first = len(flight.tokens) - len(flight.logprobs)
        logprobs = flight.logprobs[max(0, start - first) :] or None
        again = Emission(
            flight.claimed,
            start,
            flight.tokens[start:],
            emission.finish,
            emission.error,
            logprobs,
            emission.meta,
        )
        self._emitter.send([again])

    def _drop(self, request_id: str) -> None:
        self._engine.abort(request_id)
        self._flights.pop(request_id, None)

    # --- out

    def publish(self, events: list[TokenEvent]) -> None:
        """One step's tokens, in one call per API process."""
        emissions = []
        for event in events:
            flight = self._flights.get(event.request_id)
            if flight is not None:
                emissions.append(self._emission(flight, event))
        self._emitter.send(emissions)

    def _emission(self, flight: Flight, event: TokenEvent) -> Emission:
        start, tokens, logprobs, meta = len(flight.tokens), [], None, None
        if start == 0:
            meta = RequestMeta(
                cached_tokens=event.cached_tokens,
                prompt_logprobs=None
                if event.prompt_logprobs is None
                else tuple(None if p is None else wire_logprob(p) for p in event.prompt_logprobs),
            )
        if event.token is not None:
            tokens = [event.token]
            flight.tokens.append(event.token)
            if event.logprob is not None:
                logprobs = [wire_logprob(event.logprob)]
                flight.logprobs += logprobs
        flight.asked_s = time.monotonic()
        flight.finished = event.finish is not None
        finish: FinishReason | None = "stop" if event.finish == "stop" else "length" if event.finish else None
        return Emission(flight.claimed, start, tokens, finish, None, logprobs, meta)

    def _finish(self, flight: Flight, reason: FinishReason, error: str | None = None) -> None:
        flight.finished = True
        self._emitter.send([Emission(flight.claimed, len(flight.tokens), (), reason, error)])

    # --- leases

    def beat(self, status: WorkerStatus) -> None:
        """Called between steps only, so a loop that hangs loses its leases by itself."""
        try:
            for request_id in self._requests.beat([f.claimed for f in self._flights.values()], status):
                self._drop(request_id)
        except redis.RedisError as error:
            log.warning("beat_failed", error=str(error))

    def close(self) -> None:
        """Hands back what is still in flight."""
        self._emitter.stop(timeout_s=5.0)
        try:
            self._requests.release([f.claimed for f in self._flights.values() if not f.finished])
            self._requests.retire()
        except redis.RedisError as error:
            log.warning("release_failed", error=str(error))


def engine_sampling(request: GenerateRequest, eos_token_ids: tuple[int, ...]) -> Sampling:
    wire = request.sampling
    stops = frozenset(wire.stop_token_ids) | (frozenset() if wire.ignore_eos else frozenset(eos_token_ids))
    return Sampling(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=tuple(wire.logit_bias.items()),
        seed=wire.seed,
        stop_token_ids=stops,
        logprobs=wire.logprobs,
        prompt_logprobs=wire.prompt_logprobs,
    )


def wire_logprob(logprob: Logprob) -> TokenLogprob:
    return TokenLogprob(logprob=logprob.logprob, top=logprob.top)
