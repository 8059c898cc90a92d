"""How well iteration times are predicted: `python -m benchmarks.latency`.

The engine serves a scripted mix: requests alone, a job alone, then both, under three service levels, so that windows
of all sizes come up; every third request has an adapter. The time that each lane computes in an iteration is compared
with what the table from start-up says, with the table corrected by the iterations before, and with the plan, which
adds a margin; whole iterations, in which lanes wait for each other, with the plan alone.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.console import console
from benchmarks.options import SMOLLM2, Model
from benchmarks.report import save
from services.gpu_worker.engine.batch import Batch, Timing
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.latency import Work
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.gpu_worker.engines import make_adapter

METHOD = LoraConfig(16, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
TIERS = {"priority": 150.0, "default": 300.0, "flex": 600.0}  # milliseconds between tokens
ADAPTER = "adapter"
RUNNING = 8  # requests that the script keeps the engine at, at most
LENGTHS = (16, 400)  # tokens of prompts, and of training examples


@dataclass(frozen=True, slots=True)
class Part:
    """Of an iteration what one lane computes, of one lane all but updates."""

    kind: str
    table_ms: float
    corrected_ms: float
    planned_ms: float
    actual_ms: float


@dataclass(slots=True)
class Summary:
    """Quantiles of |actual / predicted - 1|, and what the margin costs and saves."""

    iterations: int
    mean_ms: float
    table_p50: float
    table_p95: float
    corrected_p50: float
    corrected_p95: float
    margin: float = field(default=1.0)
    exceeded: float = field(default=0.0)

    @classmethod
    def of(cls, found: list[Part]) -> Summary:
        table = sorted(abs(i.actual_ms / i.table_ms - 1) for i in found)
        corrected = sorted(abs(i.actual_ms / i.corrected_ms - 1) for i in found)
        middle, high = (len(found) - 1) // 2, math.ceil(0.95 * len(found)) - 1
        return cls(
            len(found),
            sum(i.actual_ms for i in found) / len(found),
            table[middle],
            table[high],
            corrected[middle],
            corrected[high],
            sum(i.planned_ms / i.corrected_ms for i in found) / len(found),
            sum(i.actual_ms > i.planned_ms for i in found) / len(found),
        )


class WatchedEngine(Engine):
    """Notes each iteration's predictions, as they were before it is learnt from."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        super().__init__(config)
        self.start_s = time.perf_counter() - started
        self.parts: list[Part] = []
        self.plans: list[tuple[float, float]] = []  # planned, actual milliseconds of iterations

    def _learn(self, batch: Batch, timing: Timing) -> None:
        latency = self.scheduler.latency if batch.num_lanes == 1 else self.scheduler.lane_latency
        assert latency is not None
        for lane, times in enumerate(timing.lanes):
            forward = Work() if lane else batch.forward_work
            parts = [(latency.table_forward_ms(forward), latency.forward_correction(forward))]
            works = [step.work for step in batch.steps if step.lane == lane]
            parts += [(latency.table_step_ms(work), latency.step_correction(work)) for work in works]
            self.parts.append(
                Part(
                    kind_of(batch, lane),
                    sum(table_ms for table_ms, _ in parts),
                    sum(table_ms * correction.level for table_ms, correction in parts),
                    sum(table_ms * correction.factor for table_ms, correction in parts),
                    times.forward_ms + times.steps_ms,
                )
            )
        self.plans.append((batch.predicted_ms, timing.total_ms))
        super()._learn(batch, timing)


def kind_of(batch: Batch, lane: int) -> str:
    parts = {
        "decode": lane == 0 and batch.decodes,
        "prompt": lane == 0 and batch.prompts,
        "window": lane == 0 and batch.forwards,
        "steps": [step for step in batch.steps if step.lane == lane],
    }
    names = " + ".join(name for name, found in parts.items() if found)
    return f"{names}, one of two lanes" if names and batch.num_lanes > 1 else names


@dataclass(slots=True)
class Script:
    """The same requests and examples in every run; how many of them are served depends on the machine."""

    engine: WatchedEngine
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    count: int = 0

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, self.engine.model.config.vocab_size) for _ in range(count)]

    def ask(self) -> None:
        self.count += 1
        self.engine.add(
            f"r{self.count}",
            self.tokens(self.rng.randint(*LENGTHS)),
            Sampling(max_tokens=self.rng.randint(8, 64)),
            adapter=ADAPTER if self.count % 3 == 0 else None,
            tier=list(TIERS)[self.count % len(TIERS)],
        )

    def train(self) -> None:
        lengths = [self.rng.randint(*LENGTHS) for _ in range(256)]
        tokens = np.array(self.tokens(sum(lengths)), np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        dataset = Dataset(tokens, np.ones(len(tokens), np.uint8), offsets)
        self.engine.add_job("job", JobConfig(n_epochs=100, batch_size=4), METHOD, dataset)

    def run(self, seconds: float, requests: bool) -> None:
        """Serves as many requests at once as a wave that comes and goes says."""
        scheduler, started = self.engine.scheduler, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            wanted = round(RUNNING * (0.55 + 0.45 * math.sin(elapsed)))
            while requests and len(scheduler.running) + len(scheduler.waiting) < wanted:
                self.ask()
            self.engine.step()


def measure(model: Path, threads: int, seconds: float) -> dict[str, Any]:
    load = os.getloadavg()[0]
    slos = {tier: SLO(ms, 10 * ms, rank) for rank, (tier, ms) in enumerate(TIERS.items())}
    with tempfile.TemporaryDirectory() as profiles:
        config = EngineConfig(
            model,
            num_threads=threads,
            slos=slos,
            profile_dir=Path(profiles),
            scheduler=SchedulerConfig(idle_ms=500.0),
        )
        first_s = WatchedEngine(config).start_s
        engine = WatchedEngine(config)
    engine.load_adapter(ADAPTER, make_adapter(engine.model.config, METHOD, std=0.01))
    script = Script(engine)
    script.run(seconds / 4, requests=True)
    script.train()
    script.run(seconds / 2, requests=True)
    for name in [sequence.request_id for sequence in (*engine.scheduler.running, *engine.scheduler.waiting)]:
        engine.abort(name)
    script.run(seconds / 4, requests=False)
    kinds = sorted({part.kind for part in engine.parts} - {""})
    off = sorted(abs(actual_ms / planned_ms - 1) for planned_ms, actual_ms in engine.plans)
    return {
        "model": model.name,
        "dtype": str(engine.model.weights.dtype).removeprefix("torch."),
        "threads": threads or os.cpu_count(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "busy": load > 1.0,  # others computed at the same time: the figures are theirs as well
        "start_s": {"measured": first_s, "kept": engine.start_s},
        "all": asdict(Summary.of([part for part in engine.parts if part.kind])),
        "kinds": {k: asdict(Summary.of([part for part in engine.parts if part.kind == k])) for k in kinds},
        "plans": {
            "iterations": len(off),
            "p50": off[len(off) // 2],
            "p95": off[int(0.95 * len(off))],
            "exceeded": statistics.mean(actual_ms > planned_ms for planned_ms, actual_ms in engine.plans),
        },
        "parts": {part: asdict(errors) for part, errors in engine.scheduler.latency.errors().items()},
    }


def show(results: dict[str, Any]) -> None:
    table = Table(title="|actual / predicted - 1| of iterations")
    table.add_column("kind", no_wrap=True)
    for column in ("n", "ms", "table p50", "p95", "corrected p50", "p95", "margin", "exceeded"):
        table.add_column(column, justify="right")
    for kind, found in (*results["kinds"].items(), ("all", results["all"])):
        shares = [f"{found[key]:.1%}" for key in list(found)[2:6]]
        margin, exceeded = f"{found['margin']:.2f}", f"{found['exceeded']:.1%}"
        table.add_row(kind, str(found["iterations"]), f"{found['mean_ms']:.1f}", *shares, margin, exceeded)
    console.print(table)
    plans = results["plans"]
    console.print(
        f"{plans['iterations']} whole iterations beside their plans: {plans['p50']:.1%} off at the median, "
        f"{plans['p95']:.1%} at p95; {plans['exceeded']:.1%} took longer"
    )
    load, start = results["load_average"], results["start_s"]
    busy = ": the machine was busy, and the figures are worse for it" if results["busy"] else ""
    console.print(f"load average {load['before']:.1f} before, {load['after']:.1f} after{busy}")
    console.print(
        f"start: {start['measured']:.1f} s with measurements, {start['kept']:.1f} s with those kept"
    )


def main(
    model: Model = SMOLLM2,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of serving and training.")] = 45.0,
) -> None:
    results = measure(model, threads, seconds)
    show(results)
    console.print(f"saved to {save('latency', results)}")


if __name__ == "__main__":
    typer.run(main)
