"""Decoding beside the time in which the device could have read what it reads, prompts beside its products."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from benchmarks.gpu.bench import Bench, Row
from benchmarks.replay import percentiles
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import Sampling

AIM = 1.35  # times the floor, up to AIM_BATCH sequences
AIM_BATCH = 64
SKIPPED = 3  # first iterations of a full batch, in which graphs may be captured


@dataclass(slots=True)
class Requests:
    """Random prompts of one length, and how many tokens each request has by now."""

    engine: Engine
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lengths: dict[str, int] = field(default_factory=dict)

    def add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        for _ in range(count):
            name = f"r{len(self.lengths)}"
            self.lengths[name] = num_tokens
            prompt = self.rng.choices(range(3, self.engine.model.config.vocab_size), k=num_tokens)
            self.engine.add(name, prompt, Sampling(max_tokens=max_tokens), cache_salt=name)

    def step(self) -> tuple[float, int, int]:
        """Milliseconds of an iteration; tokens of decodes and of prompts in it."""
        started = time.perf_counter()
        result = self.engine.step()
        taken = time.perf_counter() - started
        for event in result.tokens:
            self.lengths[event.request_id] += 1
        return taken * 1000, result.stats.num_decode_tokens, result.stats.num_prefill_tokens

    def abort(self) -> None:
        for name in self.lengths:
            self.engine.abort(name)
        self.lengths.clear()
        while self.engine.has_work:
            self.step()


def start(bench: Bench) -> Generator[Row]:
    """Of an engine: what has to be compiled and measured takes its time once."""
    for name in ("the first", "the next"):
        yield _start(bench, name)


def _start(bench: Bench, name: str) -> Row:
    with bench.engine() as engine:
        return {"engine": name, "seconds": bench.starts_s[-1], "cached tokens": _cached_tokens(engine)}


def _cached_tokens(engine: Engine) -> int:
    """That there is room for."""
    return engine.cache.num_blocks * engine.cache.block_size


def decode(bench: Bench) -> Generator[Row]:
    """Floor: the bytes of weights, keys and values over the bandwidth that was measured."""
    with bench.engine() as engine:
        tokens = _cached_tokens(engine)
        for batch in bench.scale.decode_batches:
            most = bench.scale.decode_context + max_tokens(bench, batch)
            if batch * most > tokens:
                print(f"  batch {batch}: {batch * most} tokens do not fit into a cache of {tokens}")
                continue
            yield _decode(bench, Requests(engine), batch)


def max_tokens(bench: Bench, batch: int) -> int:
    """To generate, so that the first ones still decode when the last prompt has been read."""
    reading = math.ceil(batch * bench.scale.decode_context / bench.scale.batched_tokens)
    return reading + batch // 4 + bench.scale.decode_steps + SKIPPED + 8


def _decode(bench: Bench, requests: Requests, batch: int) -> Row:
    scale = bench.scale
    requests.add(batch, scale.decode_context, max_tokens(bench, batch))
    times: list[float] = []
    keys = 0
    while len(times) < scale.decode_steps + SKIPPED and requests.engine.has_work:
        ms, decodes, prompts = requests.step()
        if decodes == batch and not prompts:
            times.append(ms)
            keys = max(keys, sum(requests.lengths.values()))
    requests.abort()
    if len(times) <= SKIPPED:
        raise RuntimeError(f"never were {batch} sequences decoded at once")
    found = percentiles(times[SKIPPED:])
    read = bench.decoded_bytes + keys * bench.kv_bytes
    floor = bench.ratio(read * 1000, "bandwidth")
    over = found["p50"] / floor if floor else None
    return {
        "batch": batch,
        "context": keys // batch,
        "TPOT p50 ms": found["p50"],
        "p99 ms": found["p99"],
        "floor ms": floor,
        "x floor": over,
        "aim": AIM if batch <= AIM_BATCH else None,
        "reached": over <= AIM if over and batch <= AIM_BATCH else None,
        "tokens/s": 1000 * batch / found["p50"],
    }


def prefill(bench: Bench) -> Generator[Row]:
    """Ceiling: two FLOPs a parameter and token, at the rate of the best product; attention is not counted."""
    with bench.engine() as engine:
        for length in bench.scale.prompts:
            if length < bench.scale.context:
                yield _prefill(bench, Requests(engine), length)


def _prefill(bench: Bench, requests: Requests, length: int) -> Row:
    count = max(1, bench.scale.prompt_tokens // length)
    requests.add(1, length, 1)
    while requests.engine.has_work:
        requests.step()
    requests.add(count, length, 1)
    started = time.perf_counter()
    while requests.engine.has_work:
        requests.step()
    rate = count * length / (time.perf_counter() - started)
    bench.found["prefill"] = max(bench.found.get("prefill", 0.0), rate)
    flops = 2 * bench.weights.config.num_linear_params * rate
    return {
        "prompt": length,
        "tokens/s": rate,
        "TFLOP/s": flops / 1e12,
        "of ceiling": bench.ratio(flops, "flops"),
    }
