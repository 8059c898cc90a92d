"""Where the time of a decode, of a piece of a prompt and of a finetuning iteration goes, kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.serving import Requests

TOP = 12
ITERATIONS = 4


def profiles(bench: Bench) -> Iterator[Row]:
    """Milliseconds are of one iteration; `device ms` is the sum of its kernels, so that what it lacks to `wall ms` is
    time in which the device had nothing to do."""
    for batch in (bench.scale.decode_batches[0], bench.scale.decode_batches[-1]):
        yield from _decode(bench, batch)
    yield from _finetuning(bench)


def _decode(bench: Bench, batch: int) -> Iterator[Row]:
    with bench.engine() as engine:
        requests = Requests(engine)
        requests.add(batch, bench.scale.decode_context // 4, 10_000 if bench.on_gpu else 100)
        for _ in range(10_000):
            _, decodes, prompts = requests.step()
            if decodes == batch and not prompts:
                break
        for _ in range(4):
            requests.step()
        yield from _rows(bench, f"decode, batch {batch}", requests.step)


def _finetuning(bench: Bench) -> Iterator[Row]:
    """Windows of a whole step on average: forward, backward and some of the optimizer."""
    with bench.engine() as engine:
        bench.add_job(engine)
        for _ in range(2 * ITERATIONS):
            engine.step()
        yield from _rows(bench, "finetuning", engine.step)


def _rows(bench: Bench, name: str, step: Callable[[], object]) -> Iterator[Row]:
    activities = [ProfilerActivity.CUDA] if bench.on_gpu else [ProfilerActivity.CPU]
    bench.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(ITERATIONS):
            step()
        bench.synchronize()
        wall_ms = (time.perf_counter() - started) * 1000 / ITERATIONS
    found = sorted(profiler.key_averages(), key=lambda event: _self_us(bench, event), reverse=True)
    total_ms = sum(_self_us(bench, event) for event in found) / 1000 / ITERATIONS
    yield {
        "part": name,
        "kernel": "all",
        "wall ms": wall_ms,
        "device ms": total_ms,
        "share": 1.0,
        "launches": sum(event.count for event in found) / ITERATIONS,
    }
    for event in found[:TOP]:
        own_ms = _self_us(bench, event) / 1000 / ITERATIONS
        yield {
            "part": name,
            "kernel": event.key[:60],
            "wall ms": None,
            "device ms": own_ms,
            "share": own_ms / total_ms,
            "launches": event.count / ITERATIONS,
        }


def _self_us(bench: Bench, event: Any) -> float:
    return float(event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total)
