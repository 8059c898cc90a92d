"""An engine on Triton's kernels says the same as one on torch's: prompts, decodes, adapters and jobs in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.backend import KernelChoice
from services.gpu_worker.model.peft import LoraConfig
from tests.gpu_worker.engines import METHODS, TARGETS, Output, make_adapter, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset

LIMITS = {"max_model_len": 40, "max_num_batched_tokens": 24, "finetune_window": 12, "max_num_seqs": 6}
LORA = LoraConfig(4, 8.0, TARGETS)
ADAPTERS = {"first": LORA, "second": LoraConfig(2, 6.0, ("q_proj", "down_proj")), "scaled": METHODS["ia3"]}


def engine_of(folder: Path, device: torch.device, kernels: KernelChoice, **config: Any) -> Engine:
    engine = make_engine(
        folder, num_blocks=64, device=str(device), kernels=kernels, scheduler=LIMITS, lanes=False, **config
    )
    for seed, (name, method) in enumerate(ADAPTERS.items()):
        engine.load_adapter(name, make_adapter(engine.model.config, method, seed=seed))
    return engine


def serve(engine: Engine) -> dict[str, Output]:
    """Prompts of several lengths for the base model and three adapters, cut into pieces, while a job trains."""
    data = make_dataset([9, 6, 8], engine.model.config.vocab_size)
    engine.add_job("ftjob-1", JobConfig(batch_size=3, warmup_ratio=0.0, max_steps=2), LORA, data)
    users = [None, "first", "second", None, "scaled", "first"]
    for number, user in enumerate(users):
        prompt = prompt_of(engine, 1 + number * 6, seed=number)
        engine.add(f"r{number}", prompt, Sampling(max_tokens=4, logprobs=2), adapter=user)
    return run(engine, *(f"r{number}" for number in range(len(users))))[0]


@pytest.fixture(scope="module")
def expected(folder: Path, device: torch.device) -> dict[str, Output]:
    return serve(engine_of(folder, device, "torch"))


def test_everybody_gets_the_tokens_that_torch_computes(
    folder: Path, device: torch.device, expected: dict[str, Output]
) -> None:
    found = serve(engine_of(folder, device, "triton"))
    for name, output in expected.items():
        assert found[name].tokens == output.tokens
        for ours, theirs in zip(found[name].logprobs, output.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
