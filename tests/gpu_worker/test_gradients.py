"""The gate: token-level gradients equal whole-sequence autograd for any cut into windows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gpu_worker.finetune.activations import POLICIES
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.model.adapters import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.oracle import batch_loss, exact_norms, lora_tensors, make_peft
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("llama", "llama3.1", "qwen2", "qwen3", "mistral")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Tiny models: 8 query heads over 2 key/value heads, tied and untied."""
    root = tmp_path_factory.mktemp("models")
    return {
        (name, tied): make_tiny_model(
            root / f"{name}-{tied}", name, tied=tied, num_layers=3, num_heads=8, num_kv_heads=2
        )
        for name in ARCHITECTURES
        for tied in (False, True)
    }


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-4))


def gradient_error(
    folder: Path,
    dtype: torch.dtype,
    lengths: list[int],
    sizes: random.Random,
    largest: int,
    targets: tuple[str, ...],
    policy: str,
    in_flight: int,
    masked: float = 0.3,
    dropout: float = 0.0,
) -> float:
    """Worst relative error of any LoRA gradient over one optimizer step cut into random windows."""
    torch.manual_seed(0)
    model = make_transformer(folder, dtype)
    dataset = make_dataset(lengths, model.config.vocab_size, masked=masked)
    lora = LoraConfig(rank=4, alpha=6.0, targets=targets)
    trainer = make_trainer(
        model,
        dataset,
        lora=lora,
        config=JobConfig(batch_size=len(dataset), lora_dropout=dropout),
        policy=policy,
        max_tokens_in_flight=max(in_flight, max(lengths)),
    )
    with exact_norms():
        peft = make_peft(folder, dtype, lora.rank, lora.alpha, targets)
        for key, (a, b) in lora_tensors(peft).items():
            trainer.parameters.masters()[key][0].copy_(a)
            trainer.parameters.masters()[key][1].copy_(b)
        trainer.parameters.refresh()
        if dropout:
            use_masks(peft, trainer)
        loss = batch_loss(peft, dataset, list(range(len(dataset))))
        loss.backward()
    advance(trainer, lambda: sizes.randint(1, largest))

    mean, _ = trainer._total.means()
    assert mean == pytest.approx(float(loss.detach()), rel=1e-5 if dtype == torch.float32 else 1e-9)
    expected = lora_tensors(peft, gradients=True)
    worst = 0.0
    for layer, groups in enumerate(trainer.parameters.gradients):
        for gradient in groups.values():
            for block in gradient.b:
                name = next(
                    n
                    for n, (p, columns) in trainer.parameters.weights.blocks.items()
                    if (p.rows, columns) == (block.out, block.rank) and gradient is groups[p.group]
                )
                a, b = expected[layer, name]
                worst = max(worst, relative_error(gradient.a[block.rank], a), relative_error(block.grad, b))
    return worst


def use_masks(peft: Any, trainer: Trainer) -> None:
    """Puts our masks of a single training sequence of one example where peft draws its own."""
    sequence = trainer.job.sequence
    dropout = Dropout(trainer.job.config.lora_dropout, f"0|0|{sequence.examples[0]}")
    tokens = slice(0, sequence.num_tokens)

    class Masked(torch.nn.Module):
        def __init__(self, layer: int, group: str) -> None:
            super().__init__()
            self.place = layer, group

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * dropout.mask(*self.place, tokens, x[0])

    for name, module in peft.named_modules():
        if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
            parts = name.split(".")
            group = trainer.parameters.weights.blocks[parts[-1]][0].group
            module.lora_dropout["default"] = Masked(int(parts[parts.index("layers") + 1]), group)


@pytest.mark.parametrize("policy", ["full", "x_only"])
def test_dropout_masks_are_the_same_in_every_window_and_in_the_backward(
    folders: dict[tuple[str, bool], Path], policy: str
) -> None:
    error = gradient_error(
        folders["qwen3", False], torch.float64, [150], random.Random(4), 40, TARGETS, policy, 150, dropout=0.4
    )
    assert error < 1e-9


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_equal_autograd_for_every_architecture(
    folders: dict[tuple[str, bool], Path], architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    error = gradient_error(
        folders[architecture, tied], dtype, [37, 22, 5], random.Random(1), 9, TARGETS, "no_gu", 48
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_every_activation_policy_gives_the_same_gradients(
    folders: dict[tuple[str, bool], Path], architecture: str, policy: str
) -> None:
    error = gradient_error(
        folders[architecture, False], torch.float64, [23, 14], random.Random(2), 7, TARGETS, policy, 64
    )
    assert error < 1e-9


@pytest.mark.parametrize("largest", [1, 1000])
def test_windows_of_one_token_and_of_a_whole_sequence_are_exact(
    folders: dict[tuple[str, bool], Path], largest: int
) -> None:
    error = gradient_error(
        folders["llama", True], torch.float64, [19, 11], random.Random(3), largest, TARGETS, "full", 64
    )
    assert error < 1e-9


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    largest=st.integers(1, 50),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    policy=st.sampled_from(sorted(POLICIES)),
    in_flight=st.integers(40, 120),
    masked=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_gradients_equal_autograd_for_random_windows(
    folders: dict[tuple[str, bool], Path],
    architecture: str,
    tied: bool,
    dtype: torch.dtype,
    lengths: list[int],
    seed: int,
    largest: int,
    targets: list[str],
    policy: str,
    in_flight: int,
    masked: float,
) -> None:
    ordered = tuple(name for name in TARGETS if name in targets)
    error = gradient_error(
        folders[architecture, tied],
        dtype,
        lengths,
        random.Random(seed),
        largest,
        ordered,
        policy,
        in_flight,
        masked,
    )
    assert error < TOLERANCE[dtype]
