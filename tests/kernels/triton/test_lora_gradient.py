"""The backward of low-rank parts, all blocks of a linear at once: the kernels and their torch twins against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.kernels import bypass as torch_twin
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.triton import lora_gradient as kernel
from services.gpu_worker.kernels.triton.sizes import LOW_RANK_PART, UnsupportedShape
from tests.kernels.triton.twins import DTYPES, Numbers, assert_close

both = pytest.mark.parametrize("ops", [torch_twin, kernel], ids=["torch", "triton"])
ROUNDINGS = 3  # of intermediates too
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# features in, and of each projection that has a block: (first feature, end, rank)
LINEARS = {
    "qkv of one rank": (40, [(0, 72, 8), (72, 90, 8), (90, 108, 8)]),
    "q and v alone": (96, [(0, 72, 4), (90, 129, 4)]),
    "ranks mixed": (130, [(0, 64, 1), (64, 80, 20), (80, 81, 70)]),
    "one projection": (65, [(0, 33, 16)]),
    "a rank of one": (16, [(0, 16, 1)]),
}


@dataclass
class Case:
    x: Tensor
    dy: Tensor
    low: Tensor
    d_low: Tensor
    grad_a: Tensor
    blocks: tuple[BlockGradient, ...]

    def accumulate(self, ops: Any) -> None:
        ops.accumulate_low_rank(self.grad_a, self.blocks, self.d_low, self.x, self.dy, self.low)

    def go_backward(self, ops: Any, dx: Tensor, a: Tensor, b: Tensor) -> None:
        """With a gradient of the intermediates that follows from `dy`."""
        self.d_low = self.dy.double() @ b.double()
        found = ops.low_rank_backward_(dx, self.grad_a, self.blocks, self.x, self.dy, self.low, a, b)
        assert found is dx

    def assert_right(self, dtype: torch.dtype, roundings: int = 1) -> None:
        """Accumulators had ones in them."""
        x, dy, low, d_low = (t.double() for t in (self.x, self.dy, self.low, self.d_low))
        assert_close(self.grad_a, 1 + d_low.T @ x, dtype, roundings)
        for block in self.blocks:
            assert_close(block.grad, 1 + block.scale * dy[:, block.out].T @ low[:, block.rank], dtype)


def make_case(linear: str, num_rows: int, draw: Numbers, scattered: bool = False) -> Case:
    """`scattered`: each projection's features are the odd ones of twice as many."""
    in_features, spans = LINEARS[linear]
    rank = sum(own for *_, own in spans)
    blocks, first_rank = [], 0
    for index, (start, end, own) in enumerate(spans):
        out: slice | Tensor = slice(start, end)
        if scattered:
            out = torch.arange(2 * start + 1, 2 * end, 2, device=draw._device)
        ranks = slice(first_rank, first_rank + own)
        blocks.append(BlockGradient(out, ranks, 0.5 + index, ones((end - start, own), draw)))
        first_rank += own
    width = spans[-1][1] * (2 if scattered else 1)
    return Case(
        draw.apart(num_rows, in_features), draw.apart(num_rows, width), draw(num_rows, rank), draw(num_rows, rank),
        ones((rank, in_features), draw), tuple(blocks),
    )  # fmt: skip


def ones(shape: Sequence[int], draw: Numbers) -> Tensor:
    return torch.ones(*shape, dtype=torch.float32, device=draw._device)


@both
@dtypes
@pytest.mark.parametrize("linear", LINEARS)
def test_every_block_gets_its_own_gradient(
    ops: Any, dtype: torch.dtype, linear: str, device: torch.device
) -> None:
    case = make_case(linear, 70, Numbers(dtype, device))
    case.accumulate(ops)
    case.assert_right(dtype)


@both
@pytest.mark.parametrize("num_rows", [1, 64, 131])
def test_windows_are_of_any_length(ops: Any, num_rows: int, device: torch.device) -> None:
    case = make_case("q and v alone", num_rows, Numbers(torch.float32, device))
    case.accumulate(ops)
    case.assert_right(torch.float32)


@both
@dtypes
def test_features_of_a_projection_may_lie_apart(ops: Any, dtype: torch.dtype, device: torch.device) -> None:
    """As ranks have them that share a model."""
    case = make_case("qkv of one rank", 9, Numbers(dtype, device), scattered=True)
    case.accumulate(ops)
    case.assert_right(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_windows_lose_nothing_to_rounding(dtype: torch.dtype, device: torch.device) -> None:
    """The sum is float32's from the first product on, so it is as exact as one of all rows."""
    draw = Numbers(dtype, device)
    whole = make_case("one projection", 96, draw)
    for start in range(0, 96, 8):
        rows = slice(start, start + 8)
        Case(
            whole.x[rows], whole.dy[rows], whole.low[rows], whole.d_low[rows], whole.grad_a, whole.blocks
        ).accumulate(kernel)
    whole.assert_right(torch.float32)


def test_gradients_are_the_same_bits_every_time(device: torch.device) -> None:
    found = []
    for _ in range(2):
        case = make_case("ranks mixed", 130, Numbers(torch.float16, device))
        case.accumulate(kernel)
        found.append(torch.cat([case.grad_a.flatten(), *(block.grad.flatten() for block in case.blocks)]))
    assert torch.equal(*found)


@both
def test_blocks_alone_and_no_rows_at_all(ops: Any, device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    case, alone = make_case("q and v alone", 12, draw), make_case("q and v alone", 12, draw)
    ops.accumulate_blocks(case.blocks, case.dy, case.low)
    assert torch.equal(case.grad_a, torch.ones_like(case.grad_a))
    case.grad_a += case.d_low.T @ case.x
    case.assert_right(torch.float32)
    no_rows = Case(alone.x[:0], alone.dy[:0], alone.low[:0], alone.d_low[:0], alone.grad_a, alone.blocks)
    no_rows.accumulate(ops)
    assert all(bool((grad == 1).all()) for grad in (alone.grad_a, *(block.grad for block in alone.blocks)))


@both
@dtypes
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_the_whole_backward_also_adds_to_the_gradient_of_the_input(
    ops: Any, dtype: torch.dtype, linear: str, num_rows: int, device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    case = make_case(linear, num_rows, draw)
    rank, width, out = case.low.shape[1], case.x.shape[1], case.dy.shape[1]
    a, b = draw(rank, width), draw(out, rank, scale=out**-0.5)
    dx = draw.apart(num_rows, width)
    exact = dx.double() + case.dy.double() @ b.double() @ a.double()
    case.go_backward(ops, dx, a, b)
    assert_close(dx, exact, dtype, ROUNDINGS)
    case.assert_right(dtype, ROUNDINGS)


@both
@dtypes
@pytest.mark.parametrize("width", [LOW_RANK_PART, 2 * LOW_RANK_PART + 24])
def test_wide_outputs_come_to_their_ranks_in_parts(
    ops: Any, dtype: torch.dtype, width: int, device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    grads = ones((20, 40), draw), ones((width, 20), draw)
    block = BlockGradient(slice(0, width), slice(0, 20), 1.0, grads[1])
    case = Case(draw(6, 40), draw(6, width), draw(6, 20), draw(6, 20), grads[0], (block,))
    a, b, dx = draw(20, 40), draw(width, 20, scale=width**-0.5), draw(6, 40)
    exact = dx.double() + case.dy.double() @ b.double() @ a.double()
    case.go_backward(ops, dx, a, b)
    assert_close(dx, exact, dtype, ROUNDINGS)
    case.assert_right(dtype, ROUNDINGS)


def test_the_gradient_of_the_input_is_the_same_bits_every_time(device: torch.device) -> None:
    found = []
    for _ in range(2):
        draw = Numbers(torch.float16, device)
        case, dx = make_case("ranks mixed", 70, draw), draw(70, 130)
        case.go_backward(kernel, dx, draw(91, 130), draw(81, 91))
        found.append(torch.cat([dx.flatten().float(), case.grad_a.flatten()]))
    assert torch.equal(*found)


def test_what_kernels_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    case = make_case("one projection", 4, draw)
    with pytest.raises(UnsupportedShape, match=r"d_low is \[4, 16\] and not \[3, 16\]"):
        kernel.accumulate_low_rank(case.grad_a, case.blocks, case.d_low, case.x[:3], case.dy, case.low)
    with pytest.raises(UnsupportedShape, match=r"float32 \[16, 64\] as dense float32 \[16, 65\]"):
        kernel.accumulate_low_rank(case.grad_a[:, :64], case.blocks, case.d_low, case.x, case.dy, case.low)
    with pytest.raises(UnsupportedShape, match=r"stream of torch.float16 and low-rank intermediates of"):
        kernel.accumulate_low_rank(case.grad_a, case.blocks, case.d_low, case.x, case.dy.half(), case.low)
    a, b, dx = draw(16, 65), draw(33, 16), draw(4, 65)
    rest = (case.grad_a, case.blocks, case.x, case.dy, case.low)
    with pytest.raises(UnsupportedShape, match=r"b is \[33, 15\] and not \[33, 16\]"):
        kernel.low_rank_backward_(dx, *rest, a, b[:, :15])
    with pytest.raises(UnsupportedShape, match=r"a stream of torch.float32 and a of torch.float16"):
        kernel.low_rank_backward_(dx, *rest, a.half(), b)
    with pytest.raises(UnsupportedShape, match=r"the rows of dx \[4, 65\] are not dense"):
        kernel.low_rank_backward_(draw(65, 4).T, *rest, a, b)
    with pytest.raises(UnsupportedShape, match="a linear of 4 projections: the kernel has 3"):
        kernel.accumulate_blocks(case.blocks * 4, case.dy, case.low)
