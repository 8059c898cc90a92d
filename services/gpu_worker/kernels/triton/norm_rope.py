"""Normalisation and the rotary embedding, each in one pass over memory; twins in `kernels/norm_rope.py`.

Computed in float32 and rounded where the twins round what others read. Rows may lie apart, as those of a split
of a fused projection do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.triton.common import Configuration
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import (
    check_rotation,
    check_shape,
    load_rows,
    rotated,
    rows_of,
    tile_of,
)
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    num_rows,
    heads,
    x_stride,
    x_head_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """`ROWS` rows a program; with a residual, `total` = x + residual is what is normalised."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = load_rows(x_ptr, rows, columns, mask, heads, x_stride, x_head_stride)
    dtype = out_ptr.dtype.element_ty
    dense = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    if HAS_RESIDUAL:
        x += load_rows(residual_ptr, rows, columns, mask, 1, residual_stride, 0)
        x = x.to(dtype).to(tl.float32)  # what later layers read
        tl.store(total_ptr + dense, x.to(dtype), mask=mask)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    normed = (x * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + dense, (normed * weight[None, :]).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    num_rows,
    heads,
    dy_stride,
    dy_head_stride,
    x_stride,
    x_head_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = load_rows(x_ptr, rows, columns, mask, heads, x_stride, x_head_stride)
    g = load_rows(dy_ptr, rows, columns, mask, heads, dy_stride, dy_head_stride)
    g *= tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    normed = x * rstd
    dx = rstd * (g - normed * (tl.sum(g * normed, 1) / WIDTH)[:, None])
    dense = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_rows,
    heads,
    x_stride,
    x_head_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """`ROWS` heads a program, of whatever tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    low = load_rows(x_ptr, rows, columns, mask, heads, x_stride, x_head_stride)
    high = load_rows(x_ptr + HALF, rows, columns, mask, heads, x_stride, x_head_stride)
    angles = (rows // heads)[:, None] * (2 * HALF) + columns[None, :]
    low, high = rotated(low, high, cos_ptr, sin_ptr, angles, mask, HALF, ADJOINT)
    dense = rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(out_ptr + dense, low.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + dense + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` over the last dimension of [N, D] or [N, heads, D]."""
    given = rows_of("x", x)
    check_shape("weight", weight, (given.width,))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, rows, warps = tile_of(given.width)
    strides = given.stride, given.head_stride, 0
    grid = (triton.cdiv(given.count, rows),)
    if given.count:
        _rms_norm_kernel[grid](
            given.tensor, given.tensor, weight, out, out, given.count, given.heads, *strides, eps,
            WIDTH=given.width, BLOCK=block, ROWS=rows, HAS_RESIDUAL=False, num_warps=warps,
        )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + y` [N, D], rounded, and `rms_norm` of that."""
    check_shape("the second summand", y, tuple(x.shape))
    first, second = rows_of("the first summand", x), rows_of("the second summand", y)
    check_shape("weight", weight, (first.width,))
    if x.ndim != 2:
        raise UnsupportedShape(f"add_rms_norm has no form for {list(x.shape)}: it has to be [N, D]")
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block, rows, warps = tile_of(first.width)
    strides = first.stride, first.head_stride, second.stride
    grid = (triton.cdiv(first.count, rows),)
    if first.count:
        _rms_norm_kernel[grid](
            first.tensor, second.tensor, weight, out, total, first.count, first.heads, *strides, eps,
            WIDTH=first.width, BLOCK=block, ROWS=rows, HAS_RESIDUAL=True, num_warps=warps,
        )  # fmt: skip
    return total, out


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`."""
    check_shape("dy", dy, tuple(x.shape))
    gradient, given = rows_of("dy", dy), rows_of("x", x)
    check_shape("weight", weight, (given.width,))
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    block, rows, warps = tile_of(given.width)
    strides = gradient.stride, gradient.head_stride, given.stride, given.head_stride
    if given.count:
        _rms_norm_backward_kernel[(triton.cdiv(given.count, rows),)](
            gradient.tensor, given.tensor, weight, dx, given.count, given.heads, *strides, eps,
            WIDTH=given.width, BLOCK=block, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return dx


def rope(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama."""
    return _rope(x_NHE, cos_NE, sin_NE, adjoint=False)


def rope_backward(dy_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Adjoint of `rope`."""
    return _rope(dy_NHE, cos_NE, sin_NE, adjoint=True)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    given = rows_of("x", x)
    cos, sin = check_rotation(given, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = given.width // 2
    block, rows, warps = tile_of(half)
    if given.count:
        _rope_kernel[(triton.cdiv(given.count, rows),)](
            given.tensor, cos, sin, out, given.count, given.heads, given.stride, given.head_stride,
            HALF=half, BLOCK=block, ROWS=rows, ADJOINT=adjoint, num_warps=warps,
        )  # fmt: skip
    return out


def _configurations(width: int) -> list[Configuration]:
    block, rows, warps = tile_of(width)
    tile = {"WIDTH": width, "BLOCK": block, "ROWS": rows}
    eps = {"eps": "fp32"}
    found = [
        configure(f"{name}-{width}", kernel, tile | constants, num_warps=warps, types=eps)
        for name, kernel, constants in (
            ("rms_norm", _rms_norm_kernel, {"HAS_RESIDUAL": False}),
            ("add_rms_norm", _rms_norm_kernel, {"HAS_RESIDUAL": True}),
            ("rms_norm_backward", _rms_norm_backward_kernel, {}),
        )
    ]
    if width <= 256:  # that of a head
        block, rows, warps = tile_of(width // 2)
        tile = {"HALF": width // 2, "BLOCK": block, "ROWS": rows}
        for name, adjoint in (("rope", False), ("rope_backward", True)):
            found.append(
                configure(f"{name}-{width}", _rope_kernel, tile | {"ADJOINT": adjoint}, num_warps=warps)
            )
    return found


CONFIGURATIONS = [each for width in (64, 128, 576, 4096, 8192) for each in _configurations(width)]
