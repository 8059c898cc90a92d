"""Whether Triton kernels can run in this process: on a GPU, or in an interpreter that it has to be started for.

Triton decides while it is imported, so that process is not the one of the other tests: without a GPU
`tests/kernels/test_triton_interpreted.py` starts one for each folder that needs it.
"""

from __future__ import annotations

import importlib.util

import torch

PASSED_INTERPRETED = "passed in Triton's interpreter"  # a property of a test that has started such a process


def is_interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from services.gpu_worker.kernels.triton.common import INTERPRETED

    return bool(INTERPRETED.value)


def ignored_here() -> list[str]:
    """For `collect_ignore_glob` of a folder whose tests run Triton kernels."""
    return [] if is_interpreted() or torch.cuda.is_available() else ["test_*.py"]


def kernel_device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if is_interpreted() else "cuda")
