"""Which kernels an engine computes with, and what it says where these cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from services.gpu_worker.kernels.backend import TORCH, choose_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_computes_with_torch_unless_told_otherwise() -> None:
    assert choose_kernels("auto", CPU) is TORCH
    assert choose_kernels("torch", CPU) is TORCH
    assert choose_kernels("torch", GPU) is TORCH


def test_what_cannot_compute_is_refused_with_the_way_round() -> None:
    pytest.importorskip("triton", reason="triton is there on Linux only")
    with pytest.raises(ValueError, match=r"'triton' do not run on cpu.*FLEXLLM_KERNELS=torch"):
        choose_kernels("triton", CPU)
    with pytest.raises(ValueError, match="'cuda' are none of auto, triton, torch"):
        choose_kernels("cuda", CPU)  # type: ignore[arg-type]


def test_a_gpu_gets_tritons_kernels() -> None:
    pytest.importorskip("triton", reason="triton is there on Linux only")
    assert choose_kernels("auto", GPU).is_triton


def test_an_engine_on_a_cpu_imports_no_triton() -> None:
    code = "import sys; import services.gpu_worker.engine.engine; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
