"""A plan for Triton's kernels says what a job on them then holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from services.gpu_worker.kernels.backend import choose_kernels
from services.gpu_worker.plan import Request
from services.gpu_worker.planner import Planner
from tests.gpu_worker.engines import METHODS
from tests.gpu_worker.training import BLOCK_SIZE, backward_peak, make_dataset, make_trainer, make_transformer
from tests.live_bytes import allocated

NUM_TOKENS, WINDOW = 48, 16


@pytest.mark.parametrize("name", ["lora", "dora", "prefix"])
def test_a_window_holds_at_its_peak_what_a_dry_run_says(
    folder: Path, device: torch.device, name: str
) -> None:
    if device.type != "cpu":
        pytest.skip("what torch allocates is the same on every device")
    method = METHODS[name]
    config = json.loads((folder / "config.json").read_text())
    planner = Planner(
        Request("tiny", config, method, dtype=torch.float32, sequence_tokens=NUM_TOKENS, window_tokens=WINDOW)
    )
    planned = planner.memory(planner.policies)

    model = make_transformer(folder, kernels=choose_kernels("triton", device), device=device)
    extra = getattr(method, "num_virtual_tokens", 0)
    dataset = make_dataset([NUM_TOKENS - extra], model.config.vocab_size)
    policies = planner.compiled.policies
    chosen = policies.index(planner.policies.chosen[0])
    trainer = make_trainer(model, dataset, method=method, policy=chosen, max_tokens_in_flight=NUM_TOKENS)
    trainer.job.blocks = list(range(NUM_TOKENS // BLOCK_SIZE))
    assert backward_peak(trainer, WINDOW, allocated) == pytest.approx(planned.window.backward_bytes, rel=0.02)
    assert trainer.memory.activations == planned.activation_bytes
    assert planned.sequence.mask_bytes == 0
