"""The engine on Triton's kernels, beside the same engine on torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders import make_tiny_model
from tests.kernels.interpreter import ignored_here, kernel_device

collect_ignore_glob = ignored_here()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return kernel_device()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as a model gets that has heads in groups, their norms, and a head of its own."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(
        path, "qwen3", tied=False, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=48
    )
