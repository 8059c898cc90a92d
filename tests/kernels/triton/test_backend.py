"""Chosen kernels that cannot do what they are asked for say so, and what to do."""

from __future__ import annotations

import pytest
import torch

from services.gpu_worker.kernels.backend import KernelFailure, choose_kernels


def test_a_failure_names_kernel_shapes_and_the_way_round(device: torch.device) -> None:
    kernels = choose_kernels("triton", device)
    x, weight = torch.ones(3, 8, dtype=torch.float64, device=device), torch.ones(8, device=device)
    expected = r"Triton's rms_norm\(float64 \[3, 8\], float32 \[8\], 1e-06\) failed: .*FLEXLLM_KERNELS=torch"
    with pytest.raises(KernelFailure, match=expected):
        kernels.rms_norm(x, weight, 1e-6)


def test_the_choice_is_the_same_object_each_time(device: torch.device) -> None:
    """Programs that are compiled for it are found again."""
    assert choose_kernels("triton", device) is choose_kernels("triton", device)
