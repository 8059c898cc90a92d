"""A finetuning step on Triton's kernels equals the step on torch's: losses, gradients, parameters, checkpoints."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.gpu_worker.finetune.checkpoint import load_checkpoint, save_checkpoint
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.reports import StepReport
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.backend import KernelChoice, choose_kernels
from services.gpu_worker.model.peft import Method
from tests.gpu_worker.engines import METHODS
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer

LENGTHS = [7, 5, 6]  # packed into one sequence


def trainer_of(
    folder: Path, device: torch.device, kernels: KernelChoice, method: Method, dropout: float = 0.0
) -> Trainer:
    """The same parameters and data whatever computes; random values where a method begins with zeros."""
    model = make_transformer(folder, kernels=choose_kernels(kernels, device), device=device)
    dataset = make_dataset(LENGTHS, model.config.vocab_size)
    config = JobConfig(
        batch_size=len(LENGTHS), n_epochs=2, learning_rate=1e-2, warmup_ratio=0.0, lora_dropout=dropout
    )
    trainer = make_trainer(model, dataset, method=method, config=config, max_tokens_in_flight=40)
    generator = torch.Generator().manual_seed(1)
    parameters = trainer.parameters
    noise = torch.randn(parameters.flat.shape, generator=generator) * 0.1
    parameters.flat.add_(noise.to(device))
    parameters.refresh()
    return trainer


def forward_and_backward(trainer: Trainer, seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step, cut into the same uneven windows."""
    sizes = random.Random(seed)
    advance(trainer, lambda: sizes.randint(5, 11))
    loss, _ = trainer._total.means().read()
    return loss, {str(key): gradient.clone() for key, gradient in trainer.parameters.gradients.items()}


def assert_same(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-4))
    assert error < 1e-4, name


def step(trainer: Trainer) -> StepReport:
    """In several calls, as an engine under load does it."""
    trainer.job.num_update_parts = trainer.parameters.num_parts
    for part in range(trainer.parameters.num_parts):
        read_report = trainer.launch_step(part, part + 1)
        trainer.job.complete_update(part + 1)
    assert read_report is not None
    return read_report()


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_torch(folder: Path, device: torch.device, name: str) -> None:
    (loss, expected), (found_loss, found) = (
        forward_and_backward(trainer_of(folder, device, kernels, METHODS[name]))
        for kernels in ("torch", "triton")
    )
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert_same(gradient, expected[key], key)


def test_dropout_masks_are_those_of_torch(folder: Path, device: torch.device) -> None:
    (_, expected), (_, found) = (
        forward_and_backward(trainer_of(folder, device, kernels, METHODS["lora"], dropout=0.4))
        for kernels in ("torch", "triton")
    )
    for key, gradient in found.items():
        assert_same(gradient, expected[key], key)


def test_steps_move_parameters_as_torch_does_and_a_checkpoint_of_either_continues_in_the_other(
    folder: Path, device: torch.device
) -> None:
    trainers = [trainer_of(folder, device, kernels, METHODS["lora"]) for kernels in ("torch", "triton")]
    for trainer in trainers:
        forward_and_backward(trainer)
    first, second = map(step, trainers)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
    states = [trainer.parameters.state() for trainer in trainers]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert_same(states[1][name], states[0][name], name)

    continued = trainer_of(folder, device, "triton", METHODS["lora"])
    load_checkpoint(continued, save_checkpoint(trainers[0]))
    for trainer in (trainers[0], continued):
        forward_and_backward(trainer, seed=1)
        step(trainer)
    assert_same(continued.parameters.flat, trainers[0].parameters.flat)
