"""What tests of kernels and their twins share: inputs in float64, and how far from exact a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# errors relative to the norm: what is promised of every kernel's results, and what holds of nearly all
ACCURACY = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# of one number, relative to the largest
MOST = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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


def relative_error(found: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Norm of the difference relative to that of the exact value, or to `least` where that is less."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=least))


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """To `times` the dtype's bounds; `exact` was computed in float64 from the same numbers."""
    assert found.shape == exact.shape
    if exact.numel():
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error <= MOST[dtype] * times
        assert relative_error(found, exact) < min(BOUNDS[dtype] * times, ACCURACY[dtype])
