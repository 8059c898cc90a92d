"""The backward of a linear's low-rank parts in three launches; the twin is in `kernels/bypass.py`.

The first takes the outputs' gradient to the ranks, `d_low = dy B`: thousands of features are cut into parts, so that
few rows have programs for all of a GPU, too, and whoever reads `d_low` adds them up. The second is for the gradients of
A and of all blocks of B, the third adds to the input's gradient.

Every number is one program's, which adds rows in their order, in float32: the same bits every time, and nothing is
rounded before it is added. torch's form takes ten launches for three projections, and rounds each window's sum to the
model's dtype.
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
from services.gpu_worker.kernels.triton.sizes import LOW_RANK_PART, UnsupportedShape

MOST_BLOCKS = 3  # a linear computes no more projections
FEATURES = 64  # of a program: a linear of a few thousand has programs for all of a GPU
ROWS = 64  # that a program multiplies at a time
FEWEST_RANKS, MOST_RANKS = 16, 64  # of a program
NUM_STAGES = 3
INPUT_WARPS = 8  # a tile that is read and written once leaves few other registers


@triton.jit(do_not_specialize=["num_rows"])
def _low_kernel(
    dy_ptr, b_ptr, low_ptr, dy_stride, width, num_ranks, num_rows,
    PART: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """low[part] = dy B over a part of the features: a tile of rows and `RANKS` ranks a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    places, here = rows.to(tl.int64)[:, None], (rows < num_rows)[:, None]
    total = tl.zeros((ROWS, RANKS), tl.float32)
    begin = tl.program_id(2) * PART
    for start in range(begin, tl.minimum(begin + PART, width), FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = here & (features < width)[None, :]
        dy = tl.load(dy_ptr + places * dy_stride + features[None, :], mask=inside, other=0.0)
        inside = (features < width)[:, None] & (ranks < num_ranks)[None, :]
        place = b_ptr + features[:, None] * num_ranks + ranks[None, :]
        total += dot(dy, tl.load(place, mask=inside, other=0.0))
    part = low_ptr + tl.program_id(2).to(tl.int64) * num_rows * num_ranks
    inside = here & (ranks < num_ranks)[None, :]
    tl.store(part + places * num_ranks + ranks[None, :], total, mask=inside)


@triton.jit
def _load_low(low_ptr, places, ranks, stride, part_stride, num_parts, inside, dtype):
    """A tile [rows, ranks] of low-rank intermediates, the sum of their parts."""
    low_ptr += places * stride + ranks
    total = tl.load(low_ptr, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, num_parts):
        total += tl.load(low_ptr + tl.cast(part, tl.int64) * part_stride, mask=inside, other=0.0)
    return total.to(dtype)


@triton.jit
def _add_gradient(
    wide_ptr, low_ptr, grad_ptr, wide_stride, low_stride, width, num_ranks, scale, part_stride, num_parts, num_rows,
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
            low = _load_low(
                low_ptr, places, ranks[None, :], low_stride, part_stride, num_parts, inside, wide.dtype
            )
            total += dot(tl.trans(wide), low)
        if RANK_MAJOR:
            place = grad_ptr + ranks[None, :] * width + features[:, None]
        else:
            place = grad_ptr + features[:, None] * num_ranks + ranks[None, :]
        inside = (features < width)[:, None] & (ranks < num_ranks)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total * scale, mask=inside)


@triton.jit(do_not_specialize=["num_parts", "part_stride", "first", "num_rows"])
def _gradient_kernel(
    wide_a_ptr, low_a_ptr, grad_a_ptr, wide_a_stride, low_a_stride, a_width, a_ranks, a_scale,
    wide_0_ptr, low_0_ptr, grad_0_ptr, wide_0_stride, low_0_stride, b0_width, b0_ranks, b0_scale,
    wide_1_ptr, low_1_ptr, grad_1_ptr, wide_1_stride, low_1_stride, b1_width, b1_ranks, b1_scale,
    wide_2_ptr, low_2_ptr, grad_2_ptr, wide_2_stride, low_2_stride, b2_width, b2_ranks, b2_scale,
    part_stride, num_parts, first, num_rows,
    ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A tile of A's gradient, which is sum 0, or of a block's of B a program; the grid begins with sum `first`."""
    which = tl.program_id(0) + first
    if which == 0:
        _add_gradient(
            wide_a_ptr, low_a_ptr, grad_a_ptr, wide_a_stride, low_a_stride, a_width, a_ranks, a_scale,
            part_stride, num_parts, num_rows, True, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    elif which == 1:
        _add_gradient(
            wide_0_ptr, low_0_ptr, grad_0_ptr, wide_0_stride, low_0_stride, b0_width, b0_ranks, b0_scale,
            0, 1, num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    elif which == 2:
        _add_gradient(
            wide_1_ptr, low_1_ptr, grad_1_ptr, wide_1_stride, low_1_stride, b1_width, b1_ranks, b1_scale,
            0, 1, num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip
    else:
        _add_gradient(
            wide_2_ptr, low_2_ptr, grad_2_ptr, wide_2_stride, low_2_stride, b2_width, b2_ranks, b2_scale,
            0, 1, num_rows, False, ROWS, RANKS, FEATURES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["part_stride", "num_parts", "num_rows"])
def _input_kernel(
    dx_ptr, low_ptr, a_ptr, dx_stride, width, num_ranks, part_stride, num_parts, num_rows,
    ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """dx += low A: a tile of rows and `FEATURES` features a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    places, here = rows.to(tl.int64)[:, None], (rows < num_rows)[:, None]
    dtype = dx_ptr.dtype.element_ty
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, num_ranks, RANKS):
        ranks = start + tl.arange(0, RANKS)
        inside = here & (ranks < num_ranks)[None, :]
        low = _load_low(low_ptr, places, ranks[None, :], num_ranks, part_stride, num_parts, inside, dtype)
        inside = (ranks < num_ranks)[:, None] & (features < width)[None, :]
        place = a_ptr + ranks[:, None] * width + features[None, :]
        total += dot(low, tl.load(place, mask=inside, other=0.0))
    inside = here & (features < width)[None, :]
    place = dx_ptr + places * dx_stride + features[None, :]
    dx = tl.load(place, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(place, dx.to(dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class _Sum:
    """What is added to a gradient: `scale` wide^T low."""

    wide: Tensor  # [N, features]
    low: Tensor  # [P, N, ranks]: parts whose sum it is
    grad: Tensor  # float32
    scale: float

    @property
    def num_ranks(self) -> int:
        return self.low.shape[-1]

    @property
    def arguments(self) -> tuple[Tensor | int | float, ...]:
        wide, low = self.wide, self.low
        return wide, low, self.grad, wide.stride(0), low.stride(-2), wide.shape[1], self.num_ranks, self.scale


def low_rank_backward_(
    dx: Tensor,
    grad_a: Tensor,
    grad_b: Sequence[BlockGradient],
    x: Tensor,
    dy: Tensor,
    low: Tensor,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """`dx` [N, in] += `dy` [N, out] `b` `a`, and what `accumulate_low_rank` adds."""
    check_floats("the stream", dy)
    shapes = {"dx": tuple(x.shape), "a": (len(a), x.shape[1]), "b": (dy.shape[1], len(a))}
    for (name, shape), given in zip(shapes.items(), (dx, a, b), strict=True):
        check_shape(name, given, shape)
        if given.dtype != dy.dtype:
            raise UnsupportedShape(f"a stream of {dy.dtype} and {name} of {given.dtype}")
    if dx.stride(1) != 1:
        raise UnsupportedShape(f"the rows of dx {list(dx.shape)} are not dense: they cannot be added to")
    if len(dy):
        parts = _low_gradient(dy, b.contiguous())
        _launch(_sum(x, parts, grad_a, (len(a), x.shape[1])), _sums(grad_b, dy, low))
        _add_to_input(dx, parts, a.contiguous())
    return dx


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


def _low_gradient(dy: Tensor, b: Tensor) -> Tensor:
    """`dy` [N, out] `b` [out, R] as float32 parts [P, N, R], whose sum it is."""
    (num_rows, width), num_ranks = dy.shape, b.shape[1]
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    ranks = _tile_ranks(num_ranks)
    grid = triton.cdiv(num_rows, ROWS), triton.cdiv(num_ranks, ranks), triton.cdiv(width, LOW_RANK_PART)
    parts = dy.new_empty(grid[2], num_rows, num_ranks, dtype=torch.float32)
    _low_kernel[grid](
        dy, b, parts, dy.stride(0), width, num_ranks, num_rows,
        PART=LOW_RANK_PART, ROWS=ROWS, RANKS=ranks, FEATURES=FEATURES, num_stages=NUM_STAGES,
    )  # fmt: skip
    return parts


def _add_to_input(dx: Tensor, parts: Tensor, a: Tensor) -> None:
    (num_rows, width), num_ranks = dx.shape, len(a)
    _input_kernel[triton.cdiv(num_rows, ROWS), triton.cdiv(width, FEATURES)](
        dx, parts, a, dx.stride(0), width, num_ranks, parts.stride(0), len(parts), num_rows,
        ROWS=ROWS, RANKS=_tile_ranks(num_ranks), FEATURES=FEATURES, num_warps=INPUT_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def _tile_ranks(num_ranks: int) -> int:
    fitting: int = triton.next_power_of_2(num_ranks)
    return min(max(fitting, FEWEST_RANKS), MOST_RANKS)


def _sums(blocks: Sequence[BlockGradient], dy: Tensor, low: Tensor) -> list[_Sum]:
    """Features that do not adjoin are put side by side first: the kernel's rows are dense."""
    found = []
    for block in blocks:
        wide, part = dy[:, block.out], low[:, block.rank]
        if part.dtype != wide.dtype:
            raise UnsupportedShape(f"a stream of {wide.dtype} and low-rank intermediates of {part.dtype}")
        found.append(_sum(wide, part, block.grad, (wide.shape[1], part.shape[1]), block.scale))
    return found


def _sum(wide: Tensor, low: Tensor, grad: Tensor, shape: tuple[int, int], scale: float = 1.0) -> _Sum:
    check_floats("the stream", wide)
    if tuple(grad.shape) != shape or grad.dtype != torch.float32 or not grad.is_contiguous():
        raise UnsupportedShape(
            f"no kernel adds to {grad.dtype} {list(grad.shape)} as dense float32 {list(shape)}"
        )
    wide, low = (t if t.stride(-1) == 1 else t.contiguous() for t in (wide, low))
    return _Sum(wide, low if low.ndim == 3 else low[None], grad, scale)


def _launch(of_a: _Sum | None, of_b: list[_Sum]) -> None:
    if len(of_b) > MOST_BLOCKS:
        raise UnsupportedShape(f"a linear of {len(of_b)} projections: the kernel has {MOST_BLOCKS}")
    own = [*([] if of_a is None else [of_a]), *of_b]
    if not own or not len(own[0].wide):
        return
    given = [of_a or own[0], *of_b]
    given += [own[-1]] * (1 + MOST_BLOCKS - len(given))  # never looked at: the grid ends before
    parts = given[0].low
    most_ranks = max(each.num_ranks for each in own)
    ranks = _tile_ranks(most_ranks)
    features = max(each.wide.shape[1] for each in own)
    _gradient_kernel[len(own), triton.cdiv(features, FEATURES), triton.cdiv(most_ranks, ranks)](
        *(argument for each in given for argument in each.arguments),
        parts.stride(0), len(parts), int(of_a is None), len(own[0].wide),
        ROWS=ROWS, RANKS=ranks, FEATURES=FEATURES, num_stages=NUM_STAGES,
    )  # fmt: skip


def _configurations(ranks: int, dtype: torch.dtype) -> list[Configuration]:
    """A's gradient from parts in float32, as `low_rank_backward_` has them."""
    tile = {"ROWS": ROWS, "RANKS": ranks, "FEATURES": FEATURES}
    types: dict[str, str | torch.dtype] = {f"grad_{name}_ptr": torch.float32 for name in ("a", "0", "1", "2")}
    types |= {f"{name}_scale": "fp32" for name in ("a", "b0", "b1", "b2")} | {"low_a_ptr": torch.float32}
    of_low = {"low_ptr": torch.float32}
    return [
        configure(f"lora_{name}-{ranks}", kernel, tile | more, dtype, warps, NUM_STAGES, own)
        for name, kernel, more, warps, own in (
            ("low_gradient", _low_kernel, {"PART": LOW_RANK_PART}, 4, of_low),
            ("gradient", _gradient_kernel, {}, 4, types),
            ("input_gradient", _input_kernel, {}, INPUT_WARPS, of_low),
        )
    ]


CONFIGURATIONS = [
    configuration
    for dtype in (torch.bfloat16, torch.float32)
    for ranks in (16, 32, MOST_RANKS)
    for configuration in _configurations(ranks, dtype)
]
