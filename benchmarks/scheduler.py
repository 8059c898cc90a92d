"""How long one decision of the scheduler takes, without a model: `python -m benchmarks.scheduler`."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from benchmarks.console import console
from benchmarks.report import save
from services.gpu_worker.engine.batch import Sampled
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.latency import Curve, LatencyModel
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig
from services.gpu_worker.finetune.packing import Examples

NUM_LAYERS, ITERATIONS, WARM_UP = 32, 1500, 100
CLASSES = (SLO(25.0, 1000.0, 0), SLO(50.0, 2000.0, 1), SLO(400.0, 16000.0, 2))


@dataclass(frozen=True, slots=True)
class Load:
    sequences: int
    jobs: int
    prompts: bool = False  # one of eight sequences ends and another comes in its place
    lanes: bool = False  # of a CPU


LOADS = (
    Load(16, 1),
    Load(64, 4),
    Load(256, 0),
    Load(256, 8),
    Load(256, 8, prompts=True),
    Load(16, 1, lanes=True),
    Load(256, 8, lanes=True),
)


def make_scheduler(load: Load) -> Scheduler:
    """Times are about those of an 8B model on a large GPU; they decide how much finetuning fits, no more."""
    latency = LatencyModel(
        forward=Curve([1, 256, 512, 4096], [8.0, 9.0, 12.0, 90.0]),
        training=Curve([0, 1000], [0.0, 5.0]),
        layer=Curve([1, 256, 2048], [0.25, 0.28, 1.6]),
        loss=Curve([1, 256, 2048], [0.3, 0.5, 3.0]),
        backward=Curve([1, 256, 2048], [0.3, 0.4, 3.0]),
        optimizer_ms=2.0,
        keys=Curve([0, 10**6], [0.0, 10.0]),
        pairs=Curve([0, 10**7], [0.0, 10.0]),
        layer_pairs=Curve([0, 10**7], [0.0, 0.3]),
        backward_pairs=Curve([0, 10**7], [0.0, 1.0]),
    )
    limits = SchedulerConfig(
        max_num_seqs=load.sequences, max_num_batched_tokens=2048, max_model_len=8192, finetune_window=1024
    )
    return Scheduler(limits, BlockManager(100_000, 16), latency, replace(latency) if load.lanes else None)


def make_sequence(number: int, now_s: float, output: int) -> Sequence:
    prompt = [number % 30_000, *range(199 + number % 400)]
    sampling = Sampling(max_tokens=output)
    slo = CLASSES[number % len(CLASSES)]
    return Sequence(str(number), prompt, len(prompt), sampling, slo=slo, arrival_s=now_s)


def make_job(number: int) -> FinetuneJob:
    examples = Examples([512 + 64 * i for i in range(8)], [100] * 8)
    config = JobConfig(n_epochs=100_000, batch_size=4)
    return FinetuneJob(
        f"ftjob-{number}", config, examples, None, NUM_LAYERS, 4096, tenant=f"tenant-{number % 3}"
    )


def measure(load: Load) -> dict[str, float]:
    """Microseconds of `schedule` and of `update`."""
    scheduler, now_s, number = make_scheduler(load), 0.0, 0
    for number in range(load.sequences):
        scheduler.add(make_sequence(number, now_s, 100_000))
    for job in range(load.jobs):
        scheduler.add_job(make_job(job))
    decisions, updates = [], []
    for iteration in range(WARM_UP + ITERATIONS):
        if load.prompts and iteration % 8 == 7:
            scheduler.abort(scheduler.running[iteration % len(scheduler.running)])
            number += 1
            scheduler.add(make_sequence(number, now_s, 100_000))
        started = time.perf_counter()
        batch = scheduler.schedule(now_s)
        decided = time.perf_counter()
        now_s += batch.predicted_ms / 1000
        sampled = [Sampled(chunk.sequence, 7) for chunk in batch.chunks if chunk.samples]
        drawn = time.perf_counter()
        scheduler.advance(batch, now_s)
        scheduler.receive(sampled, now_s)
        if iteration >= WARM_UP:
            decisions.append((decided - started) * 1e6)
            updates.append((time.perf_counter() - drawn) * 1e6)
    return {
        "decision_us_p50": statistics.median(decisions),
        "decision_us_p99": statistics.quantiles(decisions, n=100)[98],
        "update_us_p50": statistics.median(updates),
    }


def main() -> None:
    gc.freeze()
    table = Table(title="Scheduler, microseconds")
    for column in ("sequences", "jobs", "prompts come", "lanes", "decision p50", "p99", "update p50"):
        table.add_column(column, justify="right")
    loads: list[dict[str, Any]] = []
    for load in LOADS:
        found = measure(load)
        loads.append({**asdict(load), **found})
        numbers = [f"{value:.0f}" for value in found.values()]
        flags = ("yes" if flag else "" for flag in (load.prompts, load.lanes))
        table.add_row(str(load.sequences), str(load.jobs), *flags, *numbers)
    console.print(table)
    console.print(f"saved to {save('scheduler', {'loads': loads})}")


if __name__ == "__main__":
    main()
