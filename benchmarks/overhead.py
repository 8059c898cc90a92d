"""How much of a step passes outside of torch's operators: `python -m benchmarks.overhead`.

Decodes at two batch sizes, and optimizer steps of one LoRA job alone. The operators' own times come from torch's
profiler, the time of a step from the same steps without it, in turns; the least of a few rounds counts. What is
outside is told as two bounds: the time by which the profiler slows a step lies in the operators' times, or not. Of the
operators' time it is told how much is in products with weights and how much in attention, gathering keys and values
included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.console import console
from benchmarks.options import SMOLLM2, Dtypes, Model, Threads
from benchmarks.peers.finetuning import BATCH_SIZE, RANK, TARGETS, load_examples
from benchmarks.peers.serving import make_engine, make_prompts
from benchmarks.report import save
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig

DECODES = 24  # of a round, once without and once with the profiler
OPERATORS = ("aten::", "mkldnn::", "onednn::", "quantized::")
PRODUCTS = ("linear", "::mm", "::addmm")
ATTENTION = ("::bmm", "::baddbmm", "softmax", "attention", "::index_select")


def in_turns(rounds: int, step: Callable[[], None], times: int) -> dict[str, float]:
    """Milliseconds of a step, and of the operators in it; `times` steps are one measurement."""
    plain, profiled, operators, counts = list[float](), list[float](), list[dict[str, float]](), list[float]()
    for _ in range(rounds):
        plain.append(milliseconds(step, times))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            profiled.append(milliseconds(step, times))
        found = [event for event in profiler.key_averages() if event.key.startswith(OPERATORS)]
        kinds = dict.fromkeys(("products_ms", "attention_ms", "others_ms"), 0.0)
        for event in found:
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / times
        operators.append(kinds)
        counts.append(sum(event.count for event in found) / times)
    kinds = min(operators, key=lambda own: sum(own.values()))
    wall, inside, slowed = min(plain), sum(kinds.values()), min(profiled)
    return {
        "step_ms": wall,
        "profiled_step_ms": slowed,
        "operators_ms": inside,
        **kinds,
        "num_operators": min(counts),
        "outside_at_least": 1 - inside / wall,
        "outside_at_most": 1 - (inside - (slowed - wall)) / wall,
    }


def kind_of(operator: str) -> str:
    if any(name in operator for name in PRODUCTS):
        return "products_ms"
    return "attention_ms" if any(name in operator for name in ATTENTION) else "others_ms"


def milliseconds(step: Callable[[], None], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - started) * 1e3 / times


def decoding(engine: Engine, batch: int, rounds: int) -> dict[str, float]:
    """Of sequences that have all taken their prompts."""
    names = [f"r{i}" for i in range(batch)]
    for name, prompt in zip(names, make_prompts(batch), strict=True):
        engine.add(name, prompt, Sampling(max_tokens=2 * rounds * DECODES + batch + 2))
    while engine.step().stats.num_prefill_tokens:
        pass

    def step() -> None:
        assert engine.step().stats.num_decode_tokens == batch

    found = in_turns(rounds, step, DECODES)
    for name in names:
        engine.abort(name)
    return found


def finetuning(engine: Engine, folder: Path, rounds: int) -> dict[str, float]:
    """Of one batch of examples, again and again; the first step makes everything ready."""
    examples = first_examples(load_examples(folder), BATCH_SIZE)
    config = JobConfig(n_epochs=2 * rounds + 1, batch_size=BATCH_SIZE, learning_rate=1e-3)
    engine.add_job("job", config, LoraConfig(RANK, 2.0 * RANK, TARGETS), examples)

    def step() -> None:
        while not any(event.report for event in engine.step().jobs):
            pass

    step()
    found = in_turns(rounds, step, 1)
    engine.remove_job("job")
    return found


def first_examples(dataset: Dataset, count: int) -> Dataset:
    end = int(dataset.offsets[count])
    return Dataset(dataset.tokens[:end], dataset.mask[:end], dataset.offsets[: count + 1])


def show(results: dict[str, Any]) -> None:
    table = Table(title="Time of a step outside of torch's operators")
    kinds = ("step_ms", "operators_ms", "products_ms", "attention_ms", "others_ms")
    titles = ("dtype", "step", "ms", "operators, ms", "products", "attention", "others", "operators")
    for column in (*titles, "at least", "at most"):
        table.add_column(column, justify="left" if column in ("dtype", "step") else "right")
    for dtype, rows in results["dtypes"].items():
        for name, row in rows.items():
            times = (f"{row[kind]:.1f}" for kind in kinds)
            bounds = (f"{row['outside_at_least']:.1%}", f"{row['outside_at_most']:.1%}")
            table.add_row(dtype, name, *times, f"{row['num_operators']:.0f}", *bounds)
    console.print(table)


def main(
    model: Model = SMOLLM2,
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(help="Rounds, without and with the profiler; the least counts.")] = 4,
    dtype: Dtypes = None,
) -> None:
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"model": model.name, "threads": threads, "rounds": rounds, "dtypes": {}}
    for name in dtype or ["bfloat16"]:
        console.print(f"measuring {name} ...")
        engine = make_engine(model, name, threads, lanes=False)  # the profiler sees one thread's operators
        rows = {f"decode, batch {batch}": decoding(engine, batch, rounds) for batch in (1, 8)}
        rows[f"finetuning, batch {BATCH_SIZE}"] = finetuning(engine, model, rounds)
        results["dtypes"][name] = rows
    show(results)
    console.print(f"saved to {save('overhead', results)}")


if __name__ == "__main__":
    typer.run(main)
