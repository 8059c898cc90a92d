"""Tests of Triton kernels alone."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import ignored_here, kernel_device

collect_ignore_glob = ignored_here()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return kernel_device()
