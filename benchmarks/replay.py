"""Requests that arrive at an engine as a trace says, while it works on a job in between."""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.arrivals import Arrival
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import LONGEST_GAP, Sampling
from services.gpu_worker.engine.slo import SLO


@dataclass(slots=True)
class Served:
    """Times of one request's tokens, seconds after it came."""

    arrival: Arrival
    tokens_s: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return self.tokens_s[0] * 1000

    @property
    def gaps_ms(self) -> list[float]:
        return [(after - before) * 1000 for before, after in pairwise(self.tokens_s)]

    @property
    def tpot_ms(self) -> float:
        return (self.tokens_s[-1] - self.tokens_s[0]) * 1000 / (len(self.tokens_s) - 1)


def trained_tokens(engine: Engine) -> float:
    """Forward and backward through all layers; what has gone half of the way counts half."""
    job = engine.job("job")
    return job.served_tokens * job.weight / (2 * job.num_layers)


@dataclass(slots=True)
class Run:
    """An engine that serves requests as they arrive, and works on its job in between; at several times, maybe."""

    engine: Engine
    requests: dict[str, Served] = field(default_factory=dict)
    seconds: float = 0.0  # in which requests arrived
    busy_s: float = 0.0  # of these, in iterations
    trained: float = 0.0  # tokens, in the same time
    num_unfinished: int = 0  # requests that were not waited for

    @property
    def rate(self) -> float:
        """Tokens a second of finetuning."""
        return self.trained / self.seconds

    def play(self, coming: list[Arrival], seconds: float, wait_s: float = math.inf) -> None:
        """The last requests are waited for, `wait_s` at most."""
        rng, before, has_ended = random.Random(1), trained_tokens(self.engine), False
        waiting, num_open, started = coming[::-1], 0, time.perf_counter()
        while waiting or num_open or not has_ended:
            now = time.perf_counter() - started
            if now >= seconds and not has_ended:
                has_ended = True
                self.seconds += now
                self.trained += trained_tokens(self.engine) - before
            if now >= seconds + wait_s:
                self._give_up(waiting)
                return
            while waiting and waiting[-1].at_s <= now:
                self._add(waiting.pop(), rng)
                num_open += 1
            if not self.engine.has_work:
                time.sleep(0.0005)
                continue
            result = self.engine.step()
            for job in result.jobs:
                if job.error is not None:
                    raise job.error
            after = time.perf_counter() - started
            self.busy_s += 0.0 if has_ended else result.stats.timing.total_ms / 1000
            for event in result.tokens:
                request = self.requests[event.request_id]
                request.tokens_s.append(after - request.arrival.at_s)
                num_open -= event.finish is not None

    def _give_up(self, waiting: list[Arrival]) -> None:
        self.num_unfinished += len(waiting)
        for name, request in list(self.requests.items()):
            if len(request.tokens_s) < request.arrival.output_tokens:
                self.engine.abort(name)
                del self.requests[name]
                self.num_unfinished += 1

    def _add(self, arrival: Arrival, rng: random.Random) -> None:
        name = f"r{len(self.requests)}"
        self.requests[name] = Served(arrival)
        vocabulary = min(40_000, self.engine.model.config.vocab_size)
        prompt = [rng.randrange(100, vocabulary) for _ in range(arrival.prompt_tokens)]
        salt = f"{name} of {time.time_ns()}"  # nothing is cached of an earlier run of the same requests
        self.engine.add(name, prompt, Sampling(max_tokens=arrival.output_tokens), cache_salt=salt)

    def report(self, slo: SLO) -> dict[str, Any]:
        """Of the requests that were served to their end; the others attain nothing."""
        served = list(self.requests.values())
        in_time = [(r.tpot_ms <= slo.tpot_ms, r.ttft_ms <= slo.ttft_ms) for r in served]
        count = len(served) + self.num_unfinished
        steady = [max(r.gaps_ms) <= LONGEST_GAP * slo.tpot_ms for r in served]
        return {
            "requests": count,
            "attainment": {
                "tpot": sum(tpot for tpot, _ in in_time) / count,
                "ttft": sum(ttft for _, ttft in in_time) / count,
                "both": sum(map(all, in_time)) / count,
                "steady": sum(map(all, zip(map(all, in_time), steady, strict=True))) / count,
            },
            "tpot_ms": percentiles([r.tpot_ms for r in served]),
            "ttft_ms": percentiles([r.ttft_ms for r in served]),
            "gap_ms": percentiles([gap for r in served for gap in r.gaps_ms]),
            "inference_tokens_per_s": sum(r.arrival.prompt_tokens + r.arrival.output_tokens for r in served)
            / self.seconds,
            "finetuning_tokens_per_s": self.rate,
            "busy_share": self.busy_s / self.seconds,
        }


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        values = values * 2
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}
