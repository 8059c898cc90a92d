"""AdamW on flat tensors: the kernel and its torch twin against torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.kernels import adamw as torch_twin
from services.gpu_worker.kernels.adamw import AdamW, clip_factor
from services.gpu_worker.kernels.triton import adamw as kernels
from services.gpu_worker.kernels.triton.common import INTERPRETED
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.triton.twins import DTYPES, Numbers, relative_error

STEPS = 6
RATE, BETAS, EPSILON = 3e-3, (0.9, 0.999), 1e-8
both = pytest.mark.parametrize("ops", [torch_twin, kernels], ids=["torch", "triton"])


def updates(weight_decay: float) -> list[AdamW]:
    """With a learning rate that changes from step to step."""
    return [
        AdamW(step, RATE / step, *BETAS, epsilon=EPSILON, weight_decay=weight_decay)
        for step in range(1, STEPS + 1)
    ]


def gradients(size: int, device: torch.device) -> list[Tensor]:
    """Of very different lengths, so that some are clipped."""
    draw = Numbers(torch.float32, device, seed=1)
    return [draw(size, scale=10.0 ** (step % 3 - 2)) for step in range(STEPS)]


def expected(start: Tensor, weight_decay: float, most: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Masters and moments after torch's own steps in float64."""
    leaf = start.double().clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    for update, gradient in zip(updates(weight_decay), gradients(len(start), start.device), strict=True):
        leaf.grad = gradient.double()
        if most is not None:
            torch.nn.utils.clip_grad_norm_([leaf], most)
        optimizer.param_groups[0]["lr"] = update.learning_rate
        optimizer.step()
    state = optimizer.state[leaf]
    return leaf.detach(), state["exp_avg"], state["exp_avg_sq"]


@both
@pytest.mark.parametrize("most", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 1023, 1024, 2500])
def test_steps_are_those_of_torch(
    ops: Any, size: int, weight_decay: float, most: float | None, device: torch.device
) -> None:
    """Relative to each number 1e-5, float32's rounding over six steps; relative to all of them less."""
    start = Numbers(torch.float32, device)(size)
    masters, moments = start.clone(), [torch.zeros_like(start) for _ in range(2)]
    for update, gradient in zip(updates(weight_decay), gradients(size, device), strict=True):
        clip = 1.0 if most is None else clip_factor(torch.linalg.vector_norm(gradient), most)
        before = gradient.clone()
        ops.adamw_(masters, gradient, *moments, update, clip)
        assert torch.equal(gradient, before)
    for found, exact in zip((masters, *moments), expected(start, weight_decay, most), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)
        assert relative_error(found, exact) < 1e-6


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_copy_is_the_moved_masters_rounded(ops: Any, dtype: torch.dtype, device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    if ops is kernels and dtype == torch.bfloat16 and INTERPRETED.value:
        pytest.skip("Triton's interpreter cuts float32 to bfloat16 and does not round it: on a GPU only")
    masters, gradient = draw(1030), draw(1030)
    copy = torch.full((1030,), float("nan"), dtype=dtype, device=device)
    moments = [torch.zeros_like(masters) for _ in range(2)]
    ops.adamw_(masters, gradient, *moments, updates(0.1)[0], copy=copy)
    assert torch.equal(copy, masters.to(dtype))


@both
def test_a_parameter_without_a_gradient_only_decays(ops: Any, device: torch.device) -> None:
    masters = torch.ones(5, device=device)
    zeros = [torch.zeros(5, device=device) for _ in range(3)]
    ops.adamw_(masters, *zeros, AdamW(1, 0.1, weight_decay=0.5))
    torch.testing.assert_close(masters, torch.full((5,), 0.95, device=device))


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(ops: Any, bad: float, device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    masters, gradient = draw(1030), draw(1030)
    moments = [draw(1030), draw(1030).abs()]
    gradient[7] = bad
    before = [tensor.clone() for tensor in (masters, *moments)]
    for most in (0.0, 0.5):
        clip = clip_factor(torch.linalg.vector_norm(gradient), most)
        ops.adamw_(masters, gradient, *moments, updates(0.1)[0], clip)
    assert all(torch.equal(*pair) for pair in zip((masters, *moments), before, strict=True))


@both
def test_no_parameters_are_moved_without_complaint(ops: Any, device: torch.device) -> None:
    empty = torch.empty(0, device=device)
    ops.adamw_(empty, empty, empty, empty, AdamW(1, 0.1))


def test_what_kernels_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    flat = torch.ones(4, device=device)
    with pytest.raises(UnsupportedShape, match=r"grad is \[3\] and not \[4\]"):
        kernels.adamw_(flat, flat[:3], flat, flat, AdamW(1, 0.1))
    with pytest.raises(
        UnsupportedShape, match=r"exp_avg \[4\] has to be dense torch.float32 and is torch.float64"
    ):
        kernels.adamw_(flat, flat, flat.double(), flat, AdamW(1, 0.1))
    with pytest.raises(UnsupportedShape, match=r"copy is \[2, 2\] and not \[4\]"):
        kernels.adamw_(flat, flat, flat, flat, AdamW(1, 0.1), copy=flat.view(2, 2))
