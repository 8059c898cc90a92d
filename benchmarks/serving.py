"""What prefix caching, prompts in pieces and preemption do for requests: `python -m benchmarks.serving`.

Each is the engine against itself, in turns, after a round that is not counted: requests that begin alike with the
prefix cache and without; long prompts beside decodes in pieces that fit into the slack and as a whole; a key/value
cache for a tenth of the load and for all of it. Times are pooled over the rounds, throughputs are those of the best.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.console import console
from benchmarks.options import SMOLLM2, Model, ServiceLevel, Threads
from benchmarks.report import save
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.model.config import ModelConfig

SHARED, OWN, ALIKE, ANSWER = 512, 64, 16, 16  # tokens of a prompt's parts, requests, tokens of an answer
# sequences, tokens, prompts, iterations between two of them
DECODES, LONG, LONG_PROMPTS, BETWEEN = 8, 1024, 3, 16
SMALL, SMALL_PROMPT, SMALL_ANSWER = 20, 16, 32  # requests, tokens, tokens
BLOCK_SIZE = 16
NEVER_TIGHT = SLO(tpot_ms=1e6, ttft_ms=1e6)


@dataclass(frozen=True, slots=True)
class Setting:
    """Of all engines."""

    model: Path
    dtype: str
    threads: int
    slo: SLO
    profile_dir: Path


@dataclass(slots=True)
class Stream:
    """What came of a request, and when."""

    added_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        return (self.times_s[0] - self.added_s) * 1000

    def gaps_ms(self, since_s: float) -> list[float]:
        """Between tokens, from the last one before a moment on."""
        pairs = pairwise(self.times_s)
        return [(after - before) * 1000 for before, after in pairs if after > since_s]


@dataclass(slots=True)
class Client:
    """Of one engine; every request has a name and, unless it is told, a cache of its own."""

    engine: Engine
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    streams: dict[str, Stream] = field(default_factory=dict)

    def prompt(self, num_tokens: int) -> list[int]:
        return [self.rng.randrange(100, 40_000) for _ in range(num_tokens)]

    def add(self, prompt: list[int], max_tokens: int, salt: str | None = None) -> Stream:
        name = f"r{len(self.streams)}"
        stream = self.streams[name] = Stream(time.perf_counter())
        self.engine.add(name, prompt, Sampling(max_tokens=max_tokens), cache_salt=salt or name)
        return stream

    def step(self) -> None:
        result = self.engine.step()
        now = time.perf_counter()
        for event in result.tokens:
            stream = self.streams[event.request_id]
            stream.cached_tokens = event.cached_tokens
            if event.token is not None:
                stream.tokens.append(event.token)
                stream.times_s.append(now)

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def abort(self) -> None:
        for name in self.streams:
            self.engine.abort(name)


def make_engine(
    setting: Setting, slo: SLO, *, dtype: str | None = None, kv_cache_bytes: int = 256 << 20, **limits: Any
) -> Engine:
    """Without jobs, so that windows need not be measured."""
    return Engine(
        EngineConfig(
            setting.model,
            "cpu",
            dtype or setting.dtype,
            setting.threads,
            block_size=BLOCK_SIZE,
            slos={DEFAULT_TIER: slo},
            kv_cache_bytes=kv_cache_bytes,
            profile_dir=setting.profile_dir,
            scheduler=SchedulerConfig(finetune_window=64, idle_ms=slo.ttft_ms / 4, **limits),
        )
    )


def in_turns(rounds: int, *sides: Callable[[int], Any]) -> list[list[Any]]:
    """What each side finds in each round that counts; every side does the same with the same number."""
    found = [[side(number) for side in sides] for number in range(rounds + 1)]
    return [list(column) for column in zip(*found[1:], strict=True)]


# --- prefix caching


def ask_alike(engine: Engine, number: int, shares: bool) -> tuple[float, list[Stream]]:
    """Requests with the same beginning, all at once, to the end of the last; seconds and what came."""
    client = Client(engine, random.Random(number))
    shared, started = client.prompt(SHARED), time.perf_counter()
    for index in range(ALIKE):
        salt = f"{number}" if shares else f"{number}/{index}"
        client.add(shared + client.prompt(OWN), ANSWER, salt)
    client.finish()
    return time.perf_counter() - started, list(client.streams.values())


def prefix_caching(setting: Setting, rounds: int) -> dict[str, Any]:
    """Nobody is in a hurry, so that prompts are computed as fast as they can be."""
    engine = make_engine(setting, NEVER_TIGHT)
    ask = partial(ask_alike, engine)
    sides = in_turns(rounds, partial(ask, shares=True), partial(ask, shares=False))
    return {
        name: {
            "ttft_ms_p50": statistics.median(s.ttft_ms for _, streams in found for s in streams),
            "total_s": min(seconds for seconds, _ in found),
            "cached_tokens": sum(stream.cached_tokens for stream in found[0][1]),
            "prompt_tokens": ALIKE * (SHARED + OWN),
        }
        for name, found in zip(("with", "without"), sides, strict=True)
    }


# --- prompts in pieces


@dataclass(frozen=True, slots=True)
class Interrupted:
    gaps_ms: list[float]  # of the sequences that decode
    ttfts_ms: list[float]  # of the long prompts


def interrupt(engine: Engine, number: int) -> Interrupted:
    """Long prompts come one after the other while some sequences decode."""
    client = Client(engine, random.Random(number))
    decoding = [client.add(client.prompt(OWN), engine.max_model_len - OWN) for _ in range(DECODES)]
    while min(len(stream.tokens) for stream in decoding) < BETWEEN:
        client.step()
    started, ttfts_ms = time.perf_counter(), []
    for _ in range(LONG_PROMPTS):
        long = client.add(client.prompt(LONG), 1)
        while not long.tokens:
            client.step()
        ttfts_ms.append(long.ttft_ms)
        for _ in range(BETWEEN):
            client.step()
    client.abort()
    return Interrupted([gap for stream in decoding for gap in stream.gaps_ms(started)], ttfts_ms)


def prompts_in_pieces(setting: Setting, rounds: int) -> dict[str, Any]:
    """What fits into the slack, against the whole prompt at once as without a service level."""
    pieces = make_engine(setting, setting.slo)
    whole = make_engine(setting, NEVER_TIGHT, max_num_batched_tokens=LONG + DECODES)
    sides = in_turns(rounds, partial(interrupt, pieces), partial(interrupt, whole))
    found = {}
    for name, own in zip(("in pieces", "whole"), sides, strict=True):
        gaps = [gap for each in own for gap in each.gaps_ms]
        found[name] = {
            "gap_ms_p50": statistics.median(gaps),
            "gap_ms_p99": statistics.quantiles(gaps, n=100, method="inclusive")[98],
            "gap_ms_max": max(gaps),
            "ttft_ms_p50": statistics.median(ttft for each in own for ttft in each.ttfts_ms),
        }
    return found


# --- preemption


@dataclass(frozen=True, slots=True)
class Served:
    tokens: list[list[int]]
    num_preempted: int
    tokens_per_s: float  # generated, prompts included in the time


def serve(engine: Engine, number: int) -> Served:
    """Small requests, all at once."""
    client, before = Client(engine, random.Random(number)), engine.scheduler.num_preempted
    started = time.perf_counter()
    for index in range(SMALL):
        client.add(client.prompt(SMALL_PROMPT), SMALL_ANSWER, f"{number}/{index}")
    client.finish()
    tokens = [stream.tokens for stream in client.streams.values()]
    speed = sum(map(len, tokens)) / (time.perf_counter() - started)
    return Served(tokens, engine.scheduler.num_preempted - before, speed)


def preemption(setting: Setting, rounds: int) -> dict[str, Any]:
    """In float32, where rounding does not decide between tokens."""
    model, load = ModelConfig.from_folder(setting.model), SMALL * (SMALL_PROMPT + SMALL_ANSWER)
    limits = {"max_model_len": SMALL_PROMPT + SMALL_ANSWER, "max_num_seqs": SMALL}
    token_bytes = 2 * model.num_layers * model.kv_size * 4
    engines = {
        name: make_engine(setting, NEVER_TIGHT, dtype="float32", kv_cache_bytes=n * token_bytes, **limits)
        for name, n in (("a tenth", load // 10), ("all", load))
    }
    sides = in_turns(rounds, *(partial(serve, engine) for engine in engines.values()))
    reference = [each.tokens for each in sides[-1]]
    return {
        name: {
            "cache_tokens": engine.blocks.num_blocks * BLOCK_SIZE,
            "load_tokens": load,
            "requests": SMALL,
            "finished": min(sum(len(t) == SMALL_ANSWER for t in each.tokens) for each in own),
            "num_preempted": max(each.num_preempted for each in own),
            "tokens_per_s": max(each.tokens_per_s for each in own),
            "equal_outputs": [each.tokens for each in own] == reference,
        }
        for (name, engine), own in zip(engines.items(), sides, strict=True)
    }


def show(results: dict[str, Any]) -> None:
    for title, sides in results["mechanisms"].items():
        table = Table(title=title)
        table.add_column("")
        for name in next(iter(sides.values())):
            table.add_column(name.replace("_", " "), justify="right")
        for side, figures in sides.items():
            cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in figures.values())
            table.add_row(side, *cells)
        console.print(table)


def main(
    model: Model = SMOLLM2,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; preemption is in float32.")] = "bfloat16",
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(help="That count.")] = 2,
    tpot_ms: ServiceLevel = 100.0,
    ttft_ms: ServiceLevel = 2000.0,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(model, dtype, threads, SLO(tpot_ms, ttft_ms), Path(folder))
        mechanisms = {
            "prefix caching": prefix_caching(setting, rounds),
            "prompts in pieces": prompts_in_pieces(setting, rounds),
            "preemption": preemption(setting, rounds),
        }
    results = {
        "model": model.name,
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "slo": {"tpot_ms": tpot_ms, "ttft_ms": ttft_ms},
        "mechanisms": mechanisms,
    }
    show(results)
    console.print(f"saved to {save('serving', results)}")


if __name__ == "__main__":
    typer.run(main)
