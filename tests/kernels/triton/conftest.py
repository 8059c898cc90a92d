"""Tests of Triton kernels run on a GPU, or in an interpreter that a whole process has to be started for.

Triton decides while it is imported, so that process is not the one of the other tests: without a GPU
`tests/kernels/test_triton_interpreted.py` starts one for each file here.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from services.gpu_worker.kernels.triton.common import INTERPRETED

    return bool(INTERPRETED.value)


collect_ignore_glob = [] if _interpreted() or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if _interpreted() else "cuda")
