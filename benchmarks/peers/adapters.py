"""Different LoRA adapters in one batch: our engine, peft's `adapter_names`, and vLLM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.peers.serving import (
    NEW_TOKENS,
    generate_ours,
    generate_theirs,
    load_transformers,
    make_engine,
    make_prompts,
)
from benchmarks.peers.turns import OURS, Side, best, compared
from benchmarks.peers.vllm_client import Vllm
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.model.peft_files import write_peft

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
BATCH = 8
COUNTS = (4, 8)
STD = 0.02  # of both factors: outputs change, and stay far from overflow


def write_adapters(folder: Path, target: Path) -> list[Path]:
    """As many folders of PEFT's two files as the largest of COUNTS, all values random and none zero."""
    model = ModelConfig.from_folder(folder)
    method = LoraConfig(RANK, 2.0 * RANK, TARGETS)
    paths = [target / f"adapter-{index}" for index in range(max(COUNTS))]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        values = {
            (p.layer, p.key): torch.randn(p.shape, generator=generator) * STD
            for p in parameters(model, method)
        }
        path.mkdir()
        for name, data in write_peft(model, method, folder.name, values).items():
            (path / name).write_bytes(data)
    return paths


def mixed_adapters(
    folder: Path, dtype: str, threads: int, rounds: int, paths: list[Path], vllm: Vllm | None
) -> list[dict[str, Any]]:
    """A row for each of COUNTS; every adapter serves the same number of the batch's prompts."""
    engine = make_engine(folder, dtype, threads)
    for path in paths:
        engine.load_adapter(path.name, {file.name: file.read_bytes() for file in path.iterdir()})
    model = load_peft(folder, dtype, paths)
    prompts = make_prompts(BATCH)
    rows = []
    for count in COUNTS:
        wanted = [index % count for index in range(BATCH)]
        names = [paths[index].name for index in wanted]
        sides: dict[str, Side] = {
            OURS: partial(generate_ours, engine, prompts, names),
            "peft": partial(generate_theirs, model, prompts, adapter_names=names),
        }
        if vllm:
            sides["vLLM"] = partial(vllm.generate, prompts, NEW_TOKENS, wanted)
        rows.append({"adapters": count, "batch": BATCH, **compared(best(rounds, sides))})
    return rows


def load_peft(folder: Path, dtype: str, paths: list[Path]) -> Any:
    """Adapters in the model's dtype, as ours compute; peft's default of float32 would be slower."""
    options: dict[str, Any] = {"autocast_adapter_dtype": False}
    first, *others = paths
    model = PeftModel.from_pretrained(
        load_transformers(folder, dtype), first, adapter_name=first.name, **options
    )
    for path in others:
        model.load_adapter(path, path.name, **options)
    return model.eval()
