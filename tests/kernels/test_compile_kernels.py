"""Every configuration of every Triton kernel compiles for Hopper, on a machine that has no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is there on Linux only")

from benchmarks.compile_kernels import SHARED_BYTES, compile_for, configurations
from services.gpu_worker.kernels.triton.common import Configuration

MAX_SPILLED_BYTES = 512  # of a thread, stores and loads together


@pytest.mark.parametrize("configuration", configurations(), ids=lambda c: c.name)
def test_a_kernel_compiles_and_fits(configuration: Configuration) -> None:
    compiled = compile_for(configuration)
    assert compiled.spilled_bytes <= MAX_SPILLED_BYTES
    assert compiled.shared_bytes <= SHARED_BYTES
