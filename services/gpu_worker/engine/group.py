"""Engines of ranks that share a model, kept in step: rank 0 is called, the others make the same calls.

A scheduler's decisions follow from its calls, the time, the tokens drawn and what iterations took. So rank 0 tells
each call with its time before it is made, and after each iteration its tokens and timings; whatever else a rank
needs, it computes. Every rank then has the same requests, jobs and blocks, and forms the same batches. That they
do is checked before each batch, for ranks that compute different ones would wait for each other's tensors.

These messages are Python objects and go over pipes between processes of our own making, never over a port.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from services.gpu_worker.engine.batch import Batch, Timing
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import StepResult
from services.gpu_worker.engine.in_flight import InFlight, RunResult
from services.gpu_worker.finetune.job import FinetuneJob, Window
from services.gpu_worker.model.parallel import Group

MessageT = TypeVar("MessageT")
CLOSE = "close"


class OutOfStep(RuntimeError):
    """This rank's engine has come to another result than rank 0's: the group cannot go on."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the engine that rank 0 makes at `now_s`; `refusal` is how the call before it ended there."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    now_s: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes what in an iteration."""

    chunks: list[tuple[str, int, int]]  # request, first token, number of tokens
    windows: list[tuple[str, Window]]  # job
    updates: list[tuple[str, int, int]]  # job, parts of its optimizer step

    @classmethod
    def of(cls, batch: Batch) -> Plan:
        return cls(
            [(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in batch.chunks],
            [(work.job.job_id, work.window) for work in batch.forwards + batch.steps],
            [(update.job.job_id, update.start, update.end) for update in batch.updates],
        )


@dataclass(frozen=True, slots=True)
class Iteration:
    """What rank 0 found in one: tokens by request, jobs that failed, its timing, and the time afterwards."""

    tokens: list[tuple[str, int]]
    failed: list[str]
    timing: Timing
    now_s: float


class Channel:
    """Rank 0's pipes to the others, or another rank's one from rank 0."""

    def __init__(self, *pipes: Connection) -> None:
        self._pipes = pipes

    def send(self, message: Call | Plan | Iteration) -> None:
        for pipe in self._pipes:
            pipe.send(message)

    def receive(self, kind: type[MessageT]) -> MessageT:
        """Raises OutOfStep where rank 0 has sent another kind of message, and EOFError where it has ended."""
        message = self._pipes[0].recv()
        if not isinstance(message, kind):
            raise OutOfStep(f"a {kind.__name__} was due, but rank 0 sent {message}")
        return message


class GroupEngine(Engine):
    """On rank 0 an engine like any other; `close` ends the other ranks' `follow`."""

    def __init__(self, config: EngineConfig, group: Group, channel: Channel) -> None:
        self._channel = channel
        self._time_s = time.monotonic()
        self._calling = False
        self._refusal: str | None = None
        super().__init__(config, group)

    def follow(self) -> None:
        """Makes rank 0's calls until it closes. Raises as Channel.receive does."""
        while (call := self._channel.receive(Call)).name != CLOSE:
            if call.refusal != self._refusal:
                raise OutOfStep(f"rank {self.group.rank}: {self._refusal} where rank 0 had {call.refusal}")
            with suppress(ValueError):
                self._make(call)

    def close(self) -> None:
        self._channel.send(self._call(CLOSE))

    # --- calls that change an engine

    def step(self) -> StepResult:
        result: StepResult = self._together("step")
        return result

    def add(self, *args: Any, **kwargs: Any) -> None:
        self._together("add", *args, **kwargs)

    def abort(self, request_id: str) -> None:
        self._together("abort", request_id)

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._together("load_adapter", *args, **kwargs)

    def add_job(self, *args: Any, **kwargs: Any) -> FinetuneJob:
        job: FinetuneJob = self._together("add_job", *args, **kwargs)
        return job

    def remove_job(self, job_id: str) -> None:
        self._together("remove_job", job_id)

    def checkpoint_job(self, job_id: str) -> dict[str, bytes]:
        files: dict[str, bytes] = self._together("checkpoint_job", job_id)
        return files

    def export_job(self, job_id: str, base_model: str) -> dict[str, bytes]:
        files: dict[str, bytes] = self._together("export_job", job_id, base_model)
        return files

    def _together(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._calling:  # from within another call, which every rank is in
            return getattr(Engine, name)(self, *args, **kwargs)
        call = self._call(name, *args, **kwargs)
        self._channel.send(call)
        return self._make(call)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Call:
        return Call(name, args, kwargs, time.monotonic(), self._refusal)

    def _make(self, call: Call) -> Any:
        self._time_s, self._calling, self._refusal = call.now_s, True, None
        try:
            return getattr(Engine, call.name)(self, *call.args, **call.kwargs)
        except ValueError as error:  # what a caller may have asked in vain
            self._refusal = type(error).__name__
            raise
        finally:
            self._calling = False

    # --- what an iteration found

    def _now_s(self) -> float:
        return self._time_s

    def _compute(self, batch: Batch) -> InFlight:
        self._agree_on(Plan.of(batch))
        return super()._compute(batch)

    def _collect(self, flight: InFlight) -> RunResult:
        result = super()._collect(flight)
        found = Iteration(
            [(item.sequence.request_id, item.token) for item in result.sampled],
            [job_id for job_id, _ in result.failures],
            result.timing,
            time.monotonic(),
        )
        if self.group.rank == 0:
            self._channel.send(found)
        else:
            found = self._take_over(found, result)
        self._time_s = found.now_s
        return result

    def _agree_on(self, plan: Plan) -> None:
        if self.group.rank == 0:
            self._channel.send(plan)
            return
        first = self._channel.receive(Plan)
        if plan != first:
            raise OutOfStep(f"rank {self.group.rank} would compute {plan} where rank 0 computes {first}")

    def _take_over(self, own: Iteration, result: RunResult) -> Iteration:
        """Rank 0's tokens and timing in the place of this rank's, which rounding may have made different."""
        first = self._channel.receive(Iteration)
        requests = [[request_id for request_id, _ in found.tokens] for found in (own, first)]
        if requests[0] != requests[1] or own.failed != first.failed:
            raise OutOfStep(f"rank {self.group.rank} computed {own} where rank 0 computed {first}")
        tokens = [token for _, token in first.tokens]
        result.sampled = [replace(s, token=t) for s, t in zip(result.sampled, tokens, strict=True)]
        result.timing = first.timing
        return first
