"""Memory of finetuning one long sequence: the engine beside its plan, and beside autograd."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch

from benchmarks.gpu.autograd import AutogradLoop
from benchmarks.gpu.bench import GIB, JOB, METHOD, Bench, Row
from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.plan import Request
from services.gpu_worker.planner import Planner

MOST_OFF = 0.02  # of what was planned


@dataclass(slots=True)
class Meter:
    """Bytes that tensors take beyond what was there when it was entered: now, and at the most. On a CPU, which keeps
    no account, those that operations make."""

    device: torch.device
    _before: int = 0
    _live: LiveBytes = field(default_factory=LiveBytes)

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type != "cuda":
            self._live.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @property
    def now(self) -> int:
        if self.device.type != "cuda":
            return self._live.now
        return torch.cuda.memory_allocated(self.device) - self._before

    @property
    def peak(self) -> int:
        if self.device.type != "cuda":
            return self._live.peak
        return torch.cuda.max_memory_allocated(self.device) - self._before


def memory(bench: Bench) -> Generator[Row]:
    """Of the policy that the engine chooses, of the leanest and the richest; then of autograd's loops. Held is what the
    job's own account says, allocated what torch's allocator does, planned the peak as `flexllm plan` has it."""
    kept = _policies(bench)
    yield _ours(bench, "chosen", 0)
    yield _ours(bench, "leanest", kept[-1])
    yield _ours(bench, "leanest, on the host", kept[-1], offload_activations="always")
    yield _ours(bench, "richest", kept[0])
    for checkpointing in (True, False):
        yield _theirs(bench, checkpointing)


def _ours(bench: Bench, name: str, kept: int, **changes: Any) -> Row:
    """`kept`: bytes a token that the policy keeps, 0: what the engine thinks best. A first step makes the buffers and
    the optimizer's moments; a second one is measured for its speed."""
    tokens = bench.scale.memory_tokens
    options: dict[str, Any] = {
        "finetune_tokens_in_flight": tokens,
        "offload_activations": "never",
        "kv_cache_bytes": (tokens + bench.scale.context) * bench.kv_bytes,
        "activation_bytes": tokens * kept,
    }
    job = replace(JOB, batch_size=1)
    with bench.engine(**options | changes) as engine, Meter(bench.device) as meter:
        engine.add_job("job", job, METHOD, bench.dataset(2, tokens))
        _step(engine)
        bench.synchronize()
        sizes = meter.now, meter.peak
        started = time.perf_counter()
        _step(engine)
        bench.synchronize()
        taken = time.perf_counter() - started
        return _our_row(bench, engine, name, sizes, taken)


def _policies(bench: Bench) -> list[int]:
    """Bytes a token that each of the method's policies keeps in all layers, the richest first."""
    planner = _planner(bench, None)
    uniform = (LayerPolicies.uniform(planner.compiled, policy) for policy in planner.compiled.policies)
    return [own.reserve.bytes_per_token(bench.weights.dtype) for own in uniform]


def _planner(bench: Bench, budget: int | None) -> Planner:
    """As `flexllm plan` has it."""
    request = Request(
        "benchmark",
        bench.hf_config,
        METHOD,
        bench.weights.dtype,
        bench.scale.memory_tokens,
        min(bench.scale.train_tokens, bench.scale.memory_tokens),
        budget_bytes=budget,
    )
    return Planner(request)


def _our_row(bench: Bench, engine: Engine, name: str, sizes: tuple[int, int], taken: float) -> Row:
    """`sizes`: bytes that the job has brought, after a step and at the most."""
    held, admitted = engine.runner.trainers["job"].memory, engine.admission.plan_of("job").memory
    kept, expected = (own.host_activations or own.activations for own in (held, admitted))
    planner = _planner(bench, expected)
    plan, tokens = planner.memory(planner.policies), bench.scale.memory_tokens
    off = max(abs(kept / own - 1) for own in (expected, plan.activation_bytes))
    work = plan.peak_bytes - plan.activation_bytes - plan.kv_bytes
    return {
        "who": f"FlexLLM, {name}",
        "tokens": tokens,
        "kept KiB/token": (kept / tokens + bench.kv_bytes) / 1024,
        "of plan": kept / plan.activation_bytes,
        "held GiB": held.device_bytes / GIB,
        "allocated": sizes[0] / GIB,
        "peak GiB": sizes[1] / GIB,
        "planned": (admitted.activations + work + planner.adapter().total_bytes) / GIB,
        "ok": off <= MOST_OFF,
        "tokens/s": tokens / taken,
    }


def _step(engine: Engine) -> None:
    """One optimizer step."""
    while True:
        for event in engine.step().jobs:
            if event.error is not None:
                raise event.error
            if event.report is not None and event.report.train_loss is not None:
                return


def _theirs(bench: Bench, checkpointing: bool) -> Row:
    """On the longest half, quarter, ... of the sequence that fits; what does not fit is said."""
    tokens = bench.scale.memory_tokens
    while tokens > 1:
        try:
            return _their_row(bench, checkpointing, tokens)
        except torch.cuda.OutOfMemoryError:
            print(
                f"  autograd, {'with' if checkpointing else 'without'} checkpointing, {tokens} tokens: out of memory"
            )
        tokens //= 2
    raise RuntimeError("autograd's loop does not fit at any length")


def _their_row(bench: Bench, checkpointing: bool, tokens: int) -> Row:
    """Kept: after the forward, logits included."""
    bench.clean()
    example = bench.dataset(1, tokens).tokens[None]
    with Meter(bench.device) as meter:
        loop = AutogradLoop(bench.hf_config, bench.weights, JOB, checkpointing=checkpointing)
        before = meter.now
        loss = loop.forward(example)
        kept = meter.now - before
        del loss
        loop.step(example)
        bench.synchronize()
        peak = meter.peak
        started = time.perf_counter()
        loop.step(example)
        bench.synchronize()
        taken = time.perf_counter() - started
    return {
        "who": f"{loop.name}{', checkpointing' if checkpointing else ''}",
        "tokens": tokens,
        "kept KiB/token": kept / tokens / 1024,
        "of plan": None,
        "held GiB": None,
        "allocated": None,
        "peak GiB": peak / GIB,
        "planned": None,
        "ok": None,
        "tokens/s": tokens / taken,
    }
