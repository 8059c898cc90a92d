"""Every kernel against float64, on shapes of real models: relative errors of the norm, the torch twin's beside."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import starmap
from multiprocessing import get_context

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.checks import Check, Numbers, Outputs, checks
from services.gpu_worker.engine.memory import free_bytes

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
KERNELS = "services.gpu_worker.kernels"
MOST_WORKERS, WORKER_BYTES = 8, 3 << 30  # processes; memory of the device that each may need


Task = tuple[Check, torch.dtype, torch.device, bool]


def kernels(bench: Bench) -> Generator[Row]:
    """A kernel that cannot be run at all fails by itself. On a GPU processes share the work: compiling takes most of
    the time, and a kernel that breaks its process leaves this one unharmed."""
    runs = _triton_runs(bench.device)
    tasks = [(check, dtype, bench.device, runs) for check in checks(bench) for dtype in check.dtypes]
    yield from results_of(tasks, _num_workers(bench))


def _num_workers(bench: Bench) -> int:
    """0: this process alone."""
    if not bench.on_gpu:
        return 0
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2, free_bytes(bench.device) // WORKER_BYTES))


def results_of(tasks: Sequence[Task], num_workers: int) -> Generator[Row]:
    """In the order of the tasks."""
    if not num_workers:
        yield from starmap(result_of, tasks)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"))
    try:
        yield from pool.map(result_of, *zip(*tasks, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _triton_runs(device: torch.device) -> bool:
    """On a GPU, or where all of it is interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def result_of(check: Check, dtype: torch.dtype, device: torch.device, runs: bool) -> Row:
    """`runs`: Triton's kernels do. Whatever goes wrong is told in the row."""
    found: Row = {"triton": None, "torch": None}
    problem = None
    try:
        plain = import_module(f"{KERNELS}.{check.plain}")
        exact = check.call(plain, Numbers(dtype, torch.float64, device))
        found["torch"] = relative_error(check.call(plain, Numbers(dtype, dtype, device)), exact)
        if runs:
            form = import_module(f"{KERNELS}.triton.{check.triton}")
            found["triton"] = relative_error(check.call(form, Numbers(dtype, dtype, device)), exact)
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}"
    judged = found["triton" if runs else "torch"]
    ok = judged is not None and judged < LIMITS[dtype]
    own = {"kernel": check.name, "shape": check.shape, "dtype": str(dtype).removeprefix("torch.")}
    return own | found | {"limit": LIMITS[dtype], "ok": ok, "problem": problem}


def relative_error(found: Outputs, exact: Outputs) -> float:
    """The worst of the outputs' norms of the difference over those of the exact values. Raises ArithmeticError for
    what is no number."""
    pairs = zip(found, exact, strict=True)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise ArithmeticError(f"errors of {errors}: not all results are numbers")
    return max(errors)
