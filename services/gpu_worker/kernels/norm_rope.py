"""Normalisation, rotary embedding and the gated activation, each with its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (gradient checks); everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` over the last dimension, normalised in float32 and rounded before the weight."""
    wide = x.to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + y`, rounded, and `rms_norm` of that."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`; the weight is frozen."""
    wide = x.to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    g = dy.to(wide.dtype) * weight.to(wide.dtype)
    return (rstd * (g - normed * (g * normed).mean(-1, keepdim=True))).to(dy.dtype)


def rope(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama."""
    half = x_NHE.shape[-1] // 2
    rotated = torch.cat((-x_NHE[..., half:], x_NHE[..., :half]), -1)
    return x_NHE * cos_NE[:, None] + rotated * sin_NE[:, None]


def rope_backward(dy_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Adjoint of `rope`."""
    half = dy_NHE.shape[-1] // 2
    scaled = dy_NHE * sin_NE[:, None]
    return dy_NHE * cos_NE[:, None] + torch.cat((scaled[..., half:], -scaled[..., :half]), -1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, F] each."""
    return torch.nn.functional.silu(gate) * up


def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `silu_mul` with respect to `gate` and `up`."""
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu
