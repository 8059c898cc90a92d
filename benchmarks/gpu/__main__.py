"""Everything that is to be measured on a GPU, in one run: `python -m benchmarks.gpu`.

Needs torch, triton, numpy, safetensors and transformers, and nothing fetched: models of well-known shapes get random
weights on the device. Kernels are checked before anything is timed. A section that takes too long is cut, one that
fails is told and passed over; the exit code is then 1. Every figure goes to a file, which is written anew after each
section.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.memory import memory
from benchmarks.gpu.models import random_weights
from benchmarks.gpu.profiles import profiles
from benchmarks.gpu.scales import FULL, MODELS, QUICK, TINY, Scale, config_of
from benchmarks.gpu.serving import decode, prefill, start
from benchmarks.gpu.sharing import coserving, temporal
from benchmarks.gpu.tables import Table
from benchmarks.gpu.training import finetuning, losses
from benchmarks.report import RESULTS, machine, save
from services.gpu_worker.model.config import ModelConfig

SECTIONS: dict[str, Callable[[Bench], Generator[Row]]] = {
    "kernels": kernels,
    "ceilings": ceilings,
    "start": start,
    "decode": decode,
    "prefill": prefill,
    "finetuning": finetuning,
    "coserving": coserving,
    "temporal": temporal,
    "memory": memory,
    "losses": losses,
    "profile": profiles,
}


def run_section(name: str, bench: Bench) -> dict[str, Any]:
    """Its rows, up to the first one that ends after the section's time."""
    budget, started, table = bench.scale.budgets_s[name], time.perf_counter(), Table()
    found: dict[str, Any] = {"budget_s": budget, "rows": [], "is_cut": False, "error": None}
    print(f"\n{name}", flush=True)
    rows = SECTIONS[name](bench)
    try:
        for row in rows:
            found["rows"].append(row)
            table.add(row)
            if time.perf_counter() - started > budget:
                found["is_cut"] = True
                print(f"  cut after {budget:g} s: what would have come next is missing", flush=True)
                break
    except Exception:
        found["error"] = traceback.format_exc()
        print(found["error"], flush=True)
    rows.close()
    bench.clean()
    found["seconds"] = time.perf_counter() - started
    return found


def failures(section: dict[str, Any]) -> list[Row]:
    """Rows that are wrong; one that misses an aim is not."""
    return [row for row in section["rows"] if row.get("ok") is False]


def run(options: argparse.Namespace) -> int:
    """The exit code."""
    scale = TINY if options.tiny else QUICK if options.quick else FULL
    device = torch.device(options.device)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    name = device_name(device)
    results: dict[str, Any] = {
        "device": name,
        "model": MODELS[options.model],
        "dtype": str(dtype),
        "sections": {},
    }
    results["scale"] = asdict(scale)
    print(f"{MODELS[options.model]}{', tiny' if options.tiny else ''}, {dtype}, on {name}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames its options
    path = output_path(options, name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as profiles:
        bench = make_bench(options, scale, dtype, device, Path(profiles))
        for section in options.only or SECTIONS:
            results["sections"][section] = run_section(section, bench)
            results |= {"seconds": time.perf_counter() - started, "engine_starts_s": bench.starts_s}
            results["found"] = bench.found
            save(path.stem, results, path)
    print(f"\n{results['seconds']:.0f} s; saved to {path}")
    return verdict(results["sections"])


def verdict(sections: dict[str, dict[str, Any]]) -> int:
    """Says what went wrong; the exit code."""
    broken = [name for name, own in sections.items() if own["error"]]
    wrong = {name: len(rows) for name, own in sections.items() if (rows := failures(own))}
    for name in broken:
        print(f"FAIL: section {name} ended with an error, told above")
    for name, count in wrong.items():
        print(f"FAIL: {count} rows of section {name} are wrong")
    for name, own in sections.items():
        missed = sum(row.get("reached") is False for row in own["rows"])
        if missed:
            print(f"aims missed: {missed} in section {name}")
    return 1 if broken or wrong else 0


def make_bench(
    options: argparse.Namespace, scale: Scale, dtype: torch.dtype, device: torch.device, profiles: Path
) -> Bench:
    config = config_of(options.model, scale)
    started = time.perf_counter()
    weights = random_weights(ModelConfig.from_hf(config), dtype, device)
    bench = Bench(config, weights, scale, profiles, options.kernels)
    bench.synchronize()
    print(f"{weights.size_bytes / 1e9:.3g} GB of weights made in {time.perf_counter() - started:.1f} s")
    return bench


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def output_path(options: argparse.Namespace, device: str) -> Path:
    """Only a GPU's figures are kept beside the others unless a path is given."""
    if options.output:
        return Path(options.output)
    folder = RESULTS if options.device.startswith("cuda") else Path(tempfile.mkdtemp())
    model = "" if options.model == "8b" else f"-{options.model}"
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower())}{model}.json"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--device", default="cuda")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer points, in two minutes")
    size.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs, on a CPU too")
    parser.add_argument(
        "--kernels", choices=("auto", "triton", "torch"), default="auto", help="of the engine"
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be repeated")
    parser.add_argument("--output", help="of the JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[1:])))
