"""Serving and finetuning at once on the trace of a real service, and taking turns instead."""

from __future__ import annotations

from collections.abc import Generator

from benchmarks.arrivals import Arrival, arrivals
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.scales import Scale
from benchmarks.replay import Run
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sharing import SharingName
from services.gpu_worker.engine.slo import SLO

TRACE_RATE = 3.0  # requests a second that every part of the trace has; faster than that it is played faster
FEWEST = 10  # requests of a measurement, about
SEED = 1  # of the thinning: as many requests are left as a rate says, to a third, at every rate
AIMS = {(50.0, 5.0): (0.99, 0.85), (50.0, 20.0): (0.99, 0.60)}  # (TPOT, rate): attainment, share kept
WARM_UP_S = 0.3  # of measuring


def coserving(bench: Bench) -> Generator[Row]:
    """The same requests at every service level; beside it without finetuning."""
    scale = bench.scale
    yield from _runs(bench, "coserve", 0, scale.tpot_ms[0], scale.rates)
    yield from _runs(bench, "inference-only", 0, scale.tpot_ms[0], scale.rates)
    for tpot_ms in scale.tpot_ms[1:]:
        yield from _runs(bench, "coserve", 0, tpot_ms, scale.rates)


def temporal(bench: Bench) -> Generator[Row]:
    """One whole training sequence after so many iterations of inference."""
    scale = bench.scale
    for period in scale.periods:
        sharing: SharingName = "temporal" if period else "temporal-dynamic"
        yield from _runs(bench, sharing, period or 64, scale.tpot_ms[0], scale.period_rates)


def _runs(
    bench: Bench, sharing: SharingName, period: int, tpot_ms: float, rates: tuple[float, ...]
) -> Generator[Row]:
    slo = SLO(tpot_ms, bench.scale.ttft_ms)
    name = f"{sharing} {period}" if sharing == "temporal" else sharing
    with bench.engine(slo=slo, sharing=sharing, period=period) as engine:
        bench.add_job(engine)
        if sharing == "coserve":
            _find_alone(bench, engine)
        for rate in rates:
            yield {"policy": name, "TPOT limit": tpot_ms, **measure(bench, engine, slo, rate)}


def _find_alone(bench: Bench, engine: Engine) -> None:
    """Finetuning with nobody beside it, which also warms up."""
    Run(engine).play([], WARM_UP_S * bench.scale.train_s)
    run = Run(engine)
    run.play([], bench.scale.train_s)
    bench.found["alone"] = max(bench.found.get("alone", 0.0), run.rate)


def seconds_of(scale: Scale, rate: float) -> float:
    """In which requests arrive: longer where they are few."""
    return max(scale.trace_s, FEWEST / rate)


def requests(scale: Scale, rate: float) -> list[Arrival]:
    """Bursts and lengths of the trace, thinned to a rate, or played faster."""
    faster = max(1.0, rate / TRACE_RATE)
    found = arrivals(rate / faster, seconds_of(scale, rate) * faster, scale.context, SEED)
    return [Arrival(one.at_s / faster, one.prompt_tokens, one.output_tokens) for one in found]


def measure(bench: Bench, engine: Engine, slo: SLO, rate: float) -> Row:
    """Where nobody was served in time there are no times to tell."""
    scale, run, seconds = bench.scale, Run(engine), seconds_of(bench.scale, rate)
    run.play(requests(scale, rate), seconds, scale.wait_s)
    served = run.report(slo) if run.requests else {}
    attained = served["attainment"]["both"] if served else 0.0
    kept = bench.ratio(run.rate, "alone")
    rest = bench.ratio(served.get("inference_tokens_per_s", 0.0), "prefill")
    aim = AIMS.get((slo.tpot_ms, rate)) if engine.config.scheduler.sharing == "coserve" else None
    return {
        "req/s": rate,
        "requests": len(run.requests) + run.num_unfinished,
        "unfinished": run.num_unfinished,
        "attained": attained,
        "steady": served["attainment"]["steady"] if served else 0.0,
        "TPOT p50": served["tpot_ms"]["p50"] if served else None,
        "p99": served["tpot_ms"]["p99"] if served else None,
        "TTFT p99": served["ttft_ms"]["p99"] if served else None,
        "served tok/s": served.get("inference_tokens_per_s", 0.0),
        "trained tok/s": run.rate,
        "kept": kept,
        "possible": None if rest is None else max(0.0, 1 - rest),
        "aims": " / ".join(f"{part:.0%}" for part in aim) if aim else None,
        "reached": attained >= aim[0] and kept >= aim[1] if aim and kept is not None else None,
    }
