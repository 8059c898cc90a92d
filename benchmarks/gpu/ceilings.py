"""What the device can do at best: the figures that floors are computed from."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch

from benchmarks.gpu.bench import Bench, Row


def ceilings(bench: Bench) -> Generator[Row]:
    """Sustained for a second or so, which is slower than a first burst where power is limited."""
    yield from _bandwidths(bench)
    scale, config = bench.scale, bench.weights.config
    size = scale.matmul_size
    for name, rows, inside, outside in (
        ("square", size, size, size),
        ("gate and up of a window", scale.train_tokens, config.hidden_size, 2 * config.intermediate_size),
    ):
        yield _product(bench, name, rows, inside, outside)


def _bandwidths(bench: Bench) -> Generator[Row]:
    source = torch.empty(bench.scale.copy_bytes, dtype=torch.uint8, device=bench.device).random_(0, 60)
    target, numbers = torch.empty_like(source), source.view(torch.float32)
    copied = _seconds(bench, lambda: target.copy_(source))
    yield _bandwidth(bench, "copy", 2 * source.nbytes / copied)
    read = _seconds(bench, lambda: numbers.sum())
    yield _bandwidth(bench, "read (sum)", source.nbytes / read)


def _bandwidth(bench: Bench, name: str, bytes_per_s: float) -> Row:
    bench.found["bandwidth"] = max(bench.found.get("bandwidth", 0.0), bytes_per_s)
    return {"what": name, "GB/s": bytes_per_s / 1e9, "TFLOP/s": None}


def _product(bench: Bench, name: str, rows: int, inside: int, outside: int) -> Row:
    dtype = bench.weights.dtype
    x = torch.randn(rows, inside, dtype=dtype, device=bench.device)
    w = torch.randn(outside, inside, dtype=dtype, device=bench.device)
    out = x.new_empty(rows, outside)
    seconds = _seconds(bench, lambda: torch.mm(x, w.T, out=out))
    flops = 2 * rows * inside * outside / seconds
    bench.found["flops"] = max(bench.found.get("flops", 0.0), flops)
    return {"what": f"{name}, {rows} x {inside} x {outside}", "GB/s": None, "TFLOP/s": flops / 1e12}


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    """Of one call, on average over `ceiling_s` in which nobody waits between calls."""
    work()
    bench.synchronize()
    calls, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < bench.scale.ceiling_s or not calls:
        for _ in range(8):
            work()
        bench.synchronize()
        calls += 8
    return taken / calls
