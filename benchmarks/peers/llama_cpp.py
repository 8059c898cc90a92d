"""llama.cpp decoding one sequence, beside our engine on weights of the same precision."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.peers.gguf_file import Weights, write_gguf
from benchmarks.peers.serving import NEW_TOKENS, PROMPT_TOKENS, generate_ours, make_engine, make_prompts
from benchmarks.peers.turns import OURS, Run, best, compared
from benchmarks.peers.vllm_client import peers_environment

QUANTISE = {"bfloat16": "none", "int8": "int8"}


def single_stream(
    bench: Path, folder: Path, threads: int, rounds: int, scratch: Path
) -> list[dict[str, Any]]:
    """A row for each precision of the linears; `bench` is llama.cpp's program llama-bench."""
    rows = []
    for weights in get_args(Weights):
        path = scratch / f"{weights}.gguf"
        write_gguf(folder, path, weights)
        engine = make_engine(folder, "bfloat16", threads, quantise=QUANTISE[weights])
        sides = {
            OURS: partial(generate_ours, engine, make_prompts(1)),
            "llama.cpp": partial(generate, bench, path, threads),
        }
        rows.append({"weights": weights, "batch": 1, **compared(best(rounds, sides))})
    return rows


def generate(bench: Path, model: Path, threads: int) -> Run:
    """A prompt, whose last position gives the first token, and a decode for each further one; loading and a
    first run to warm up are not in the time."""
    test = f"{PROMPT_TOKENS},{NEW_TOKENS - 1}"
    options = ("-t", str(threads), "-p", "0", "-n", "0", "-pg", test, "-r", "1", "-o", "json")
    done = subprocess.run(
        [bench, "-m", model, *options],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=peers_environment(threads),
    )
    (found,) = json.loads(done.stdout)
    return Run(NEW_TOKENS, found["samples_ns"][0] / 1e9)
