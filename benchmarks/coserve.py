"""Serving and finetuning at once, by every way of sharing the machine, on a real trace: `python -m
benchmarks.coserve`.

For each policy and rate the same requests arrive at the same times while one LoRA job trains on GSM8K. All policies
are the same engine; `spatial` is two processes of it with half of the threads each, `coserve-one-lane` has all threads
work on one thing at a time. A request attains its service level where its first token and its mean time between
tokens are both within it; it is steady where no gap between two tokens is over twice the promised mean besides.
Finetuning counts what went forward and backward while requests arrived. An ideal scheduler would train in the time in
which inference alone leaves the machine idle, as fast as finetuning alone. A shared machine is not equally fast all the
time, so the policies take turns at each rate, forth and back, each time with requests of another part of the trace.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks import coserve_plot
from benchmarks.arrivals import BEGIN_S, arrivals
from benchmarks.console import console
from benchmarks.options import SMOLLM2, Dtype, Model, ServiceLevel, Threads
from benchmarks.peers.finetuning import RANK, TARGETS, Training, load_examples
from benchmarks.replay import Run
from benchmarks.report import save
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sharing import SharingName
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig

Cell = dict[str, Any]
CONTEXT = 2048
JOB = JobConfig(n_epochs=100_000, batch_size=4, learning_rate=2e-4)
POLICIES: dict[str, tuple[SharingName, int]] = {
    "coserve": ("coserve", 0),
    "coserve-one-lane": ("coserve", 0),
    "inference-only": ("inference-only", 0),
    "temporal-64": ("temporal", 64),
    "temporal-dynamic": ("temporal-dynamic", 64),
    "finetune-only": ("finetune-only", 0),
}
TURNS = 2
APART_S = 600.0  # in the trace, one turn's requests from the next one's
ALONE_S = 4.0  # of finetuning without requests, in each turn
LIGHT = 0.5  # requests a second; what comes more seldom is measured for twice as long


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one run of the benchmark."""

    model: Path
    dtype: str
    threads: int
    slo: SLO
    seconds: float  # in which requests arrive, in all turns together
    profile_dir: Path  # of iteration times, which all engines share


def make_engine(setting: Setting, sharing: SharingName, period: int, lanes: bool = True) -> Engine:
    limits = SchedulerConfig(
        max_num_seqs=32,
        max_model_len=CONTEXT,
        idle_ms=setting.slo.ttft_ms / 4,
        sharing=sharing,
        period=period,
    )
    return Engine(
        EngineConfig(
            setting.model,
            "cpu",
            setting.dtype,
            setting.threads,
            lanes=lanes,
            slos={DEFAULT_TIER: setting.slo},
            kv_cache_bytes=256 << 20,
            finetune_tokens_in_flight=1024,
            profile_dir=setting.profile_dir,
            scheduler=limits,
        )
    )


def add_job(engine: Engine, setting: Setting) -> None:
    engine.add_job("job", JOB, LoraConfig(RANK, 2 * RANK, TARGETS), load_examples(setting.model))


@dataclass(slots=True)
class Side:
    """A policy's engine; beside that of `spatial` another process trains with the other half of the threads."""

    setting: Setting
    engine: Engine
    beside: Connection | None = None

    def play(self, run: Run, rate: float, turn: int) -> None:
        setting = self.setting
        seconds = setting.seconds * (2 if rate < LIGHT else 1) / TURNS
        torch.set_num_threads(setting.threads)
        if self.beside is not None:
            self.beside.send(seconds)
        run.play(arrivals(rate, seconds, CONTEXT, begin_s=BEGIN_S + turn * APART_S), seconds)
        if self.beside is not None:
            run.trained += self.beside.recv()

    def train(self, run: Run) -> None:
        """Without requests."""
        torch.set_num_threads(self.setting.threads)
        run.play([], ALONE_S)


def measure(
    sides: dict[str, Side], trainer: Side, slo: SLO, rate: float
) -> tuple[list[Cell], dict[str, float]]:
    """A cell for each policy, and tokens a second of finetuning alone: in whole sequences, and co-serving nobody."""
    coserving = sides["coserve"]
    runs = {name: Run(side.engine) for name, side in sides.items()}
    alone = {"finetuning": Run(trainer.engine), "coserving": Run(coserving.engine)}
    for turn in range(TURNS):
        trainer.train(alone["finetuning"])
        coserving.train(alone["coserving"])
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            sides[name].play(runs[name], rate, turn)
    speeds = {name: run.rate for name, run in alone.items()}
    reports = {name: run.report(slo) for name, run in runs.items()}
    idle = max(0.01, 1 - reports["inference-only"]["busy_share"])
    ideal = {"ideal_tokens_per_s": idle * max(speeds.values())}
    cells = [{"policy": name, "rate": rate, **report, **ideal} for name, report in reports.items()]
    for cell in cells:
        console.print(
            f"{rate:g} requests/s, {cell['policy']}: {cell['attainment']['both']:.0%} in time, "
            f"{cell['attainment']['steady']:.0%} steady, TPOT p99 "
            f"{cell['tpot_ms']['p99']:.0f} ms, finetuning {cell['finetuning_tokens_per_s']:.0f} tokens/s"
        )
    return cells, speeds


def make_side(name: str, setting: Setting) -> Side:
    engine = make_engine(setting, *POLICIES[name], lanes=name != "coserve-one-lane")
    add_job(engine, setting)
    return Side(setting, engine)


def make_spatial(setting: Setting) -> Side:
    half = replace(setting, threads=max(1, setting.threads // 2))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=finetune_beside, args=(half, there), daemon=True).start()
    side = make_side("inference-only", half)
    here.recv()
    return replace(side, beside=here)


def finetune_beside(setting: Setting, pipe: Connection) -> None:
    """For as many seconds as it is told, again and again; tells how many tokens."""
    engine = make_side("finetune-only", setting).engine
    pipe.send("ready")
    while True:
        run = Run(engine)
        run.play([], pipe.recv())
        pipe.send(run.trained)


def by_peft(setting: Setting) -> float:
    """Of the customary loop of transformers and peft, from the start that our side draws."""
    torch.set_num_threads(setting.threads)
    engine = make_engine(setting, *POLICIES["coserve"])
    loop = Training(setting.model, setting.dtype, engine, load_examples(setting.model))
    loop.ours()
    return loop.theirs().rate


def show(results: dict[str, Any]) -> None:
    table = Table(
        title=f"TPOT within {results['slo']['tpot_ms']:g} ms, TTFT {results['slo']['ttft_ms']:g} ms"
    )
    columns = [
        "req/s",
        "policy",
        "in time",
        "steady",
        "TPOT",
        "p99",
        "gap p99",
        "TTFT p99",
        "served",
        "trained",
        "of ideal",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for cell in sorted(results["cells"], key=lambda cell: cell["rate"]):
        table.add_row(
            f"{cell['rate']:g}",
            cell["policy"],
            f"{cell['attainment']['both']:.0%}",
            f"{cell['attainment']['steady']:.0%}",
            f"{cell['tpot_ms']['p50']:.0f}",
            f"{cell['tpot_ms']['p99']:.0f}",
            f"{cell['gap_ms']['p99']:.0f}",
            f"{cell['ttft_ms']['p99']:.0f}",
            f"{cell['inference_tokens_per_s']:.0f}",
            f"{cell['finetuning_tokens_per_s']:.0f}",
            f"{cell['finetuning_tokens_per_s'] / cell['ideal_tokens_per_s']:.0%}",
        )
    console.print(table)


def main(
    model: Model = SMOLLM2,
    dtype: Dtype = "bfloat16",
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(help="In which requests arrive, per policy and rate.")] = 16.0,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be repeated.")] = None,
    tpot_ms: ServiceLevel = 100.0,
    ttft_ms: ServiceLevel = 2000.0,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(model, dtype, threads, SLO(tpot_ms, ttft_ms), seconds, Path(folder))
        peft = by_peft(setting)
        sides = {name: make_side(name, setting) for name in POLICIES}
        trainer = sides.pop("finetune-only")
        sides["spatial"] = make_spatial(setting)
        cells, alone = [], []
        for requests_per_s in rate or [0.25, 1.0, 3.0, 4.0]:
            found, speeds = measure(sides, trainer, setting.slo, requests_per_s)
            cells += found
            alone.append(speeds)
    speeds = {name: statistics.mean(each[name] for each in alone) for name in alone[0]}
    speeds["transformers_and_peft"] = peft
    results = {
        "model": model.name,
        "dtype": dtype,
        "threads": threads,
        "seconds": seconds,
        "slo": {"tpot_ms": tpot_ms, "ttft_ms": ttft_ms},
        "alone": speeds,
        "cells": cells,
    }
    show(results)
    console.print(f"saved to {save('coserve', results)} and {coserve_plot.draw(results)}")


if __name__ == "__main__":
    typer.run(main)
