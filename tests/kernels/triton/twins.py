"""What tests of kernels and their twins share: inputs in float64, and how far from exact a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter computes it wrong
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Numbers:
    """Draws in float64, rounded to `dtype`, so that an exact result is computed from the same numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return drawn.to(self._device, self._dtype)

    def apart(self, *shape: int, gap: int = 5) -> Tensor:
        """The first columns of wider rows."""
        return self(*shape[:-1], shape[-1] + gap)[..., : shape[-1]]


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Within the dtype's tolerance of the largest number of the exact result."""
    assert found.shape == exact.shape
    if exact.numel():
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype] * times
