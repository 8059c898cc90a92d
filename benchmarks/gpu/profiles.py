"""Where the time of a decode and of a finetuning iteration goes, kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from operator import itemgetter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.serving import Requests, max_tokens

TOP, NAME = 12, 72  # kernels, and letters of their names
WARM_UP = 4  # iterations
DECODES, TRAININGS = 4, 8  # iterations that are looked at


def profiles(bench: Bench) -> Generator[Row]:
    """Milliseconds are of one iteration; `device ms` is the sum of its kernels, so that what it lacks to `wall ms` is
    time in which the device had nothing to do."""
    for batch in (bench.scale.decode_batches[0], bench.scale.decode_batches[-1]):
        yield from _decode(bench, batch)
    yield from _finetuning(bench)


def _decode(bench: Bench, batch: int) -> Generator[Row]:
    with bench.engine() as engine:
        requests = Requests(engine)
        requests.add(batch, bench.scale.decode_context, max_tokens(bench, batch))
        full = 0
        while full < WARM_UP and engine.has_work:
            _, decodes, prompts = requests.step()
            full += decodes == batch and not prompts
        yield from _rows(bench, f"decode, batch {batch}", requests.step, DECODES)


def _finetuning(bench: Bench) -> Generator[Row]:
    """Windows of a whole step on average: forward, backward and some of the optimizer."""
    with bench.engine() as engine:
        bench.add_job(engine)
        for _ in range(WARM_UP):
            engine.step()
        yield from _rows(bench, "finetuning", engine.step, TRAININGS)


def _rows(bench: Bench, name: str, step: Callable[[], object], iterations: int) -> Generator[Row]:
    activities = [ProfilerActivity.CUDA] if bench.on_gpu else [ProfilerActivity.CPU]
    bench.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(iterations):
            step()
        bench.synchronize()
        wall_ms = (time.perf_counter() - started) * 1000 / iterations
    found = [
        (event.key[:NAME], _self_us(bench, event) / 1000 / iterations, event.count / iterations)
        for event in profiler.key_averages()
    ]
    found.sort(key=itemgetter(1), reverse=True)
    total_ms = sum(own_ms for _, own_ms, _ in found)
    launches = sum(count for _, _, count in found)
    for kernel, own_ms, count in [("all", total_ms, launches), *found[:TOP]]:
        yield {
            "part": name,
            "kernel": kernel,
            "wall ms": wall_ms if kernel == "all" else None,
            "device ms": own_ms,
            "share": own_ms / total_ms,
            "launches": count,
        }


def _self_us(bench: Bench, event: Any) -> float:
    return float(event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total)
