"""How kernels that work row by row see their tensors, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 1 << 16  # a row that one program holds
TILE = 1024  # numbers that a program of few warps holds at a time


@triton.jit
def _row_offsets(rows, heads, stride, head_stride):
    return (rows // heads).to(tl.int64) * stride + (rows % heads) * head_stride


@triton.jit
def load_rows(base, rows, columns, mask, heads, stride, head_stride):
    """A tile in float32, zero outside of the mask."""
    offsets = _row_offsets(rows, heads, stride, head_stride)
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rotated(low, high, cos_ptr, sin_ptr, offsets, mask, HALF: tl.constexpr, ADJOINT: tl.constexpr):
    """Both halves of heads after the rotation, or after its adjoint; `offsets` of the tables' first half."""
    cos_low = tl.load(cos_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    if ADJOINT:
        return low * cos_low + high * sin_high, high * cos_high - low * sin_low
    else:
        return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor [N, width] or [N, heads, width] as `count` = N * heads rows, wherever they lie."""

    tensor: Tensor  # its last dimension is dense
    count: int
    heads: int
    stride: int  # between tokens
    head_stride: int
    width: int


def rows_of(name: str, x: Tensor) -> Rows:
    """Raises UnsupportedShape where `x` is of no type or shape that kernels have."""
    check_floats(name, x)
    if x.ndim not in (2, 3):
        raise UnsupportedShape(f"{name} {list(x.shape)} is neither [N, width] nor [N, heads, width]")
    if x.shape[-1] > WIDEST:
        raise UnsupportedShape(f"{name} {list(x.shape)} has rows of more than {WIDEST}")
    if x.stride(-1) != 1:
        x = x.contiguous()
    heads = 1 if x.ndim == 2 else x.shape[1]
    head_stride = 0 if x.ndim == 2 else x.stride(1)
    return Rows(x, x.shape[0] * heads, heads, x.stride(0), head_stride, x.shape[-1])


def check_floats(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise UnsupportedShape(
            f"{name} {list(x.shape)} is {x.dtype}: kernels have float32, float16, bfloat16"
        )


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise UnsupportedShape(f"{name} is {list(x.shape)} and not {list(shape)}")


def check_rotation(x: Rows, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables [N, E], dense."""
    if x.width % 2 or x.tensor.ndim != 3:
        raise UnsupportedShape(f"cannot rotate {list(x.tensor.shape)}: it has to be [N, heads, even]")
    for name, table in (("cosines", cos), ("sines", sin)):
        check_shape(name, table, (x.tensor.shape[0], x.width))
    return cos.contiguous(), sin.contiguous()


def tile_of(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps."""
    block = triton.next_power_of_2(width)
    return block, max(1, TILE // block), 4 if block <= 2 * TILE else 8 if block <= 8 * TILE else 16
