"""Gradients of a stacked linear's A and of all blocks of its B in one launch; the twin is in `kernels/bypass.py`.

Every number is one program's, which adds rows in their order, in float32: the same bits every time, and nothing is
rounded before it is added. torch's form takes two launches for A and two for each projection, and rounds each window's
sum to the model's dtype. What else a backward computes of a low-rank part, `dy B` and `d_low A`, are two dense products
of one adapter's rows: torch's, which cut the long sum of the first as no program a tile of rows can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.triton.common import Configuration, dot
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import check_floats, check_shape
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

MOST_BLOCKS = 3  # a linear computes no more projections
FEATURES = 64  # of a program: a linear of a few thousand has programs for all of a GPU
ROWS = 64  # that a program multiplies at a time
FEWEST_RANKS, MOST_RANKS = 16, 64  # of a program
NUM_STAGES = 3


@triton.jit
def _add_product(
    wide_ptr, low_ptr, grad_ptr, wide_stride, low_stride, width, num_ranks, scale, num_rows,
    RANK_MAJOR: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A tile of grad += scale * wide^T low, [features, ranks] or its transpose."""
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    if (tl.program_id(1) * FEATURES < width) & (tl.program_id(2) * RANKS < num_ranks):
        total = tl.zeros((FEATURES, RANKS), tl.float32)
        for start in range(0, num_rows, ROWS):
            rows = start + tl.arange(0, ROWS)
            places, here = rows.to(tl.int64)[:, None], (rows < num_rows)[:, None]
            inside = here & (features < width)[None, :]
            wide = tl.load(wide_ptr + places * wide_stride + features[None, :], mask=inside, other=0.0)
            inside = here & (ranks < num_ranks)[None, :]
            low = tl.load(low_ptr + places * low_stride + ranks[None, :], mask=inside, other=0.0)
            total += dot(tl.trans(wide), low)
        if RANK_MAJOR:
            place = grad_ptr + ranks[None, :] * width + features[:, None]
        else:
            place = grad_ptr + features[:, None] * num_ranks + ranks[None, :]
        inside = (features < width)[:, None] & (ranks < num_ranks)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total * scale, mask=inside)


@triton.jit(do_not_specialize=["first", "num_rows"])
def _gradient_kernel(
    wide_a_ptr, low_a_ptr, grad_a_ptr, wide_a_stride, low_a_stride, a_width, a_ranks, a_scale,
    wide_0_ptr, low_0_ptr, grad_0_ptr, wide_0_stride, low_0_stride, b0_width, b0_ranks, b0_scale,
    wide_1_ptr, low_1_ptr, grad_1_ptr, wide_1_stride, low_1_stride, b1_width, b1_ranks, b1_scale,
    wide_2_ptr, low_2_ptr, grad_2_ptr, wide_2_stride, low_2_stride, b2_width, b2_ranks, b2_scale,
    first, num_rows,
    ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A tile of A's gradient, which is sum 0, or of a block's of B a program; the grid begins with sum `first`."""
    which = tl.program_id(0) + first
    if which == 0:
        _add_product(
            wide_a_ptr, low_a_ptr, grad_a_ptr, wide_a_stride, low_a_stride, a_width, a_ranks, a_scale,
            num_rows, True, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    elif which == 1:
        _add_product(
            wide_0_ptr, low_0_ptr, grad_0_ptr, wide_0_stride, low_0_stride, b0_width, b0_ranks, b0_scale,
            num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    elif which == 2:
        _add_product(
            wide_1_ptr, low_1_ptr, grad_1_ptr, wide_1_stride, low_1_stride, b1_width, b1_ranks, b1_scale,
            num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    else:
        _add_product(
            wide_2_ptr, low_2_ptr, grad_2_ptr, wide_2_stride, low_2_stride, b2_width, b2_ranks, b2_scale,
            num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sum:
    """What is added to a gradient: `scale` wide^T low."""

    wide: Tensor  # [N, features]
    low: Tensor  # [N, ranks]
    grad: Tensor  # float32
    scale: float

    @property
    def arguments(self) -> tuple[Tensor | int | float, ...]:
        wide, low = self.wide, self.low
        return wide, low, self.grad, wide.stride(0), low.stride(0), wide.shape[1], low.shape[1], self.scale


def accumulate_low_rank(
    grad_a: Tensor, grad_b: Sequence[BlockGradient], d_low: Tensor, x: Tensor, dy: Tensor, low: Tensor
) -> None:
    """`grad_a` [R, in] += `d_low` [N, R]^T `x` [N, in]; each block of B += its part of `dy` [N, out]^T `low` [N, R]."""
    check_shape("d_low", d_low, (len(x), len(grad_a)))
    check_shape("low", low, (len(dy), low.shape[1]))
    _launch(_sum(x, d_low, grad_a, (len(grad_a), x.shape[1])), _sums(grad_b, dy, low))


def accumulate_product(grad_a: Tensor, d_low: Tensor, x: Tensor) -> None:
    """The gradient of A alone."""
    check_shape("d_low", d_low, (len(x), len(grad_a)))
    _launch(_sum(x, d_low, grad_a, (len(grad_a), x.shape[1])), [])


def accumulate_blocks(grad_b: Sequence[BlockGradient], dy: Tensor, low: Tensor) -> None:
    """The gradients of the blocks of B alone."""
    check_shape("low", low, (len(dy), low.shape[1]))
    _launch(None, _sums(grad_b, dy, low))


def _sums(blocks: Sequence[BlockGradient], dy: Tensor, low: Tensor) -> list[_Sum]:
    """Features that do not adjoin are put side by side first: the kernel's rows are dense."""
    found = []
    for block in blocks:
        wide, part = dy[:, block.out], low[:, block.rank]
        found.append(_sum(wide, part, block.grad, (wide.shape[1], part.shape[1]), block.scale))
    return found


def _sum(wide: Tensor, low: Tensor, grad: Tensor, shape: tuple[int, int], scale: float = 1.0) -> _Sum:
    check_floats("the stream", wide)
    if low.dtype != wide.dtype:
        raise UnsupportedShape(f"a stream of {wide.dtype} and low-rank intermediates of {low.dtype}")
    if tuple(grad.shape) != shape or grad.dtype != torch.float32 or not grad.is_contiguous():
        raise UnsupportedShape(
            f"no kernel adds to {grad.dtype} {list(grad.shape)} as dense float32 {list(shape)}"
        )
    wide, low = (t if t.stride(1) == 1 else t.contiguous() for t in (wide, low))
    return _Sum(wide, low, grad, scale)


def _launch(of_a: _Sum | None, of_b: list[_Sum]) -> None:
    if len(of_b) > MOST_BLOCKS:
        raise UnsupportedShape(f"a linear of {len(of_b)} projections: the kernel has {MOST_BLOCKS}")
    own = [*([] if of_a is None else [of_a]), *of_b]
    if not own or not len(own[0].wide):
        return
    given = [of_a or own[0], *of_b]
    given += [own[0]] * (1 + MOST_BLOCKS - len(given))  # never looked at: the grid ends before
    most_ranks = max(each.low.shape[1] for each in own)
    ranks = min(max(triton.next_power_of_2(most_ranks), FEWEST_RANKS), MOST_RANKS)
    features = max(each.wide.shape[1] for each in own)
    _gradient_kernel[len(own), triton.cdiv(features, FEATURES), triton.cdiv(most_ranks, ranks)](
        *(argument for each in given for argument in each.arguments),
        int(of_a is None), len(own[0].wide),
        ROWS=ROWS, RANKS=ranks, FEATURES=FEATURES, num_stages=NUM_STAGES,
    )  # fmt: skip


def _configuration(ranks: int, dtype: torch.dtype) -> Configuration:
    sums = ("a", "0", "1", "2")
    types: dict[str, str | torch.dtype] = {f"grad_{name}_ptr": torch.float32 for name in sums}
    types |= {f"{name}_scale": "fp32" for name in ("a", "b0", "b1", "b2")}
    tile = {"ROWS": ROWS, "RANKS": ranks, "FEATURES": FEATURES}
    return configure(
        f"lora_gradient-{ranks}", _gradient_kernel, tile, dtype, num_stages=NUM_STAGES, types=types
    )


CONFIGURATIONS = [
    _configuration(ranks, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for ranks in (16, 32, MOST_RANKS)
]
