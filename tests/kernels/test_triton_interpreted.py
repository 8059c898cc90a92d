"""Runs the tests that need Triton's kernels in its interpreter, a process for each folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kernels.interpreter import PASSED_INTERPRETED

pytest.importorskip("triton", reason="triton is there on Linux only")

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/kernels/triton", "tests/gpu_worker/triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kernels_are_right_in_the_interpreter(
    folder: str, record_property: Callable[[str, object], None]
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout)  # what it skipped, and why
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.findall(r"(\d+) passed", run.stdout)
    assert passed, f"nothing ran: {run.stdout[-2000:]}"
    record_property(PASSED_INTERPRETED, int(passed[-1]))
