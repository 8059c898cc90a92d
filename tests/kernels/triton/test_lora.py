"""Low-rank parts of mixed ranks in one stream: the kernels and their torch twins against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.kernels import lora as torch_twins
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.lora import LoraRun, LoraRuns
from services.gpu_worker.kernels.triton import lora
from services.gpu_worker.kernels.triton.common import UnsupportedShape
from services.gpu_worker.kernels.triton.lora_tables import place
from tests.kernels.triton.twins import DTYPES, Numbers, assert_close

both = pytest.mark.parametrize("ops", [torch_twins, lora], ids=["torch", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# (rows without an adapter before it, rows, rank) of each run
MIXED = [(0, 1, 4), (0, 17, 8), (3, 16, 16), (0, 2, 128), (1, 33, 24)]
DECODES = [(0, 1, rank) for rank in (8, 4, 5, 16)]
LONG = [(2, 130, 8), (0, 1, 3)]
CASES = [
    pytest.param(MIXED, 96, 80, id="mixed"),
    pytest.param(DECODES, 576, 192, id="decodes"),
    pytest.param(LONG, 40, 129, id="long"),
]
cases = pytest.mark.parametrize(("layout", "in_features", "out_features"), CASES)
ROUNDINGS = 3  # of intermediates too


def make_runs(
    layout: Sequence[tuple[int, int, int]], in_features: int, out_features: int, draw: Numbers
) -> LoraRuns:
    """With an accumulator of A, and B in two blocks: the first half of the ranks for the first 32 rows, the rest."""
    runs, row = [], 0
    for gap, rows, rank in layout:
        a = draw(rank, in_features, scale=in_features**-0.5)
        b = draw(out_features, rank, scale=rank**-0.5)
        half = rank // 2
        blocks = [(slice(0, 32), slice(0, half), 0.5), (slice(32, out_features), slice(half, rank), 2.0)]
        grad_b = tuple(
            BlockGradient(out, ranks, scale, ones(b[out, ranks].shape, b)) for out, ranks, scale in blocks
        )
        runs.append(LoraRun(row + gap, row + gap + rows, a, b, ones(a.shape, a), grad_b))
        row += gap + rows
    return LoraRuns(runs)


def ones(shape: Sequence[int], like: Tensor) -> Tensor:
    """An accumulator that already holds something."""
    return torch.ones(*shape, dtype=torch.float32, device=like.device)


@both
@dtypes
@cases
def test_each_run_gets_its_own_product(
    ops: Any,
    dtype: torch.dtype,
    layout: Any,
    in_features: int,
    out_features: int,
    device: torch.device,
) -> None:
    draw = Numbers(dtype, device)
    runs = make_runs(layout, in_features, out_features, draw)
    num_rows = runs.runs[-1].end + 2
    x, y = draw.apart(num_rows, in_features), draw.apart(num_rows, out_features)
    expected = y.double()
    low = ops.lora_shrink(x, runs)
    for run, part in zip(runs.runs, runs.split(low), strict=True):
        exact = x[run.rows].double() @ run.a.double().T
        assert_close(part, exact, dtype)
        expected[run.rows] += exact @ run.b.double().T
    before = y.clone()
    assert ops.lora_expand_(y, low, runs) is y
    assert_close(y, expected, dtype, ROUNDINGS)
    untouched = torch.ones(num_rows, dtype=torch.bool, device=device)
    for run in runs.runs:
        untouched[run.rows] = False
    assert torch.equal(y[untouched], before[untouched])


@both
@dtypes
@cases
@pytest.mark.parametrize("with_dx", [True, False], ids=["dx", "no dx"])
def test_each_run_adds_to_its_own_gradients(
    ops: Any,
    dtype: torch.dtype,
    layout: Any,
    in_features: int,
    out_features: int,
    with_dx: bool,
    device: torch.device,
) -> None:
    draw = Numbers(dtype, device)
    runs = make_runs(layout, in_features, out_features, draw)
    num_rows = runs.runs[-1].end
    x, dy, dx = (draw.apart(num_rows, width) for width in (in_features, out_features, in_features))
    expected = dx.double()
    ops.lora_backward_(dx if with_dx else None, dy, x, ops.lora_shrink(x, runs), runs)
    for run in runs.runs:
        rows, wide = run.rows, (x[run.rows].double(), dy[run.rows].double())
        low, d_low = wide[0] @ run.a.double().T, wide[1] @ run.b.double()
        expected[rows] += d_low @ run.a.double()
        assert run.grad_a is not None
        assert_close(run.grad_a, 1 + d_low.T @ wide[0], dtype, ROUNDINGS)
        for block in run.grad_b:
            exact = 1 + block.scale * wide[1][:, block.out].T @ low[:, block.rank]
            assert_close(block.grad, exact, dtype, ROUNDINGS)
    if with_dx:
        assert_close(dx, expected, dtype, ROUNDINGS)


def test_gradients_are_the_same_bits_every_time(device: torch.device) -> None:
    found = []
    for _ in range(2):
        draw = Numbers(torch.float16, device)
        runs = make_runs(MIXED, 48, 64, draw)
        x, dy = draw(runs.runs[-1].end, 48), draw(runs.runs[-1].end, 64)
        lora.lora_backward_(None, dy, x, lora.lora_shrink(x, runs), runs)
        found.append(torch.cat([run.grad_a.flatten() for run in runs.runs if run.grad_a is not None]))
    assert torch.equal(*found)


def test_tables_of_several_linears_go_in_one_copy(device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    many = [make_runs(MIXED, 48, 64, draw), LoraRuns([]), make_runs(DECODES, 64, 48, draw)]
    place(many, device)
    memory = {runs.plans["triton"].tiles.untyped_storage().data_ptr() for runs in many}
    assert len(memory) == 1
    for runs in (many[0], many[2]):
        x = draw(runs.runs[-1].end, runs.in_features)
        torch.testing.assert_close(lora.lora_shrink(x, runs), torch_twins.lora_shrink(x, runs))


@both
def test_a_stream_without_adapters_stays(ops: Any, device: torch.device) -> None:
    runs, x = LoraRuns([]), torch.ones(3, 4, device=device)
    low = ops.lora_shrink(x, runs)
    assert low.numel() == 0
    ops.lora_backward_(x, x, x, low, runs)
    assert torch.equal(ops.lora_expand_(x, low, runs), torch.ones(3, 4, device=device))


def test_runs_that_contradict_each_other_are_refused() -> None:
    a, b = torch.ones(4, 8), torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"starts at row 1 overlaps one to row 2"):
        LoraRuns([LoraRun(0, 2, a, b), LoraRun(1, 3, a, b)])
    with pytest.raises(
        ValueError, match=r"rows 2 to 3 with A \[4, 7\] and B \[6, 4\] are no run of a linear \[6, 8\]"
    ):
        LoraRuns([LoraRun(0, 2, a, b), LoraRun(2, 3, torch.ones(4, 7), b)])
    with pytest.raises(ValueError, match=r"rows 2 to 2"):
        LoraRuns([LoraRun(2, 2, a, b)])
    grad = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="share an accumulator"):
        LoraRuns([LoraRun(0, 2, a, b, grad), LoraRun(2, 3, a, b, grad)])


def test_what_kernels_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    a, b = torch.ones(4, 8, device=device), torch.ones(6, 4, device=device)
    runs = LoraRuns([LoraRun(0, 2, a, b)])
    with pytest.raises(UnsupportedShape, match=r"x \[1, 8\] is no stream of 2 rows or more of 8"):
        lora.lora_shrink(torch.ones(1, 8, device=device), runs)
    with pytest.raises(UnsupportedShape, match=r"x \[2, 8\] is torch.float16 and adapters are"):
        lora.lora_shrink(torch.ones(2, 8, dtype=torch.float16, device=device), runs)
    scattered = BlockGradient(torch.tensor([0, 2]), slice(0, 4), 1.0, torch.ones(2, 4, device=device))
    with pytest.raises(UnsupportedShape, match=r"\[2, 4\] from rows that do not adjoin"):
        lora.lora_shrink(torch.ones(2, 8, device=device), LoraRuns([LoraRun(0, 2, a, b, None, (scattered,))]))
    narrow = BlockGradient(slice(0, 2), slice(0, 4), 1.0, torch.ones(2, 3, device=device))
    with pytest.raises(UnsupportedShape, match=r"torch.float32 \[2, 3\] as dense float32 \(2, 4\)"):
        lora.lora_shrink(torch.ones(2, 8, device=device), LoraRuns([LoraRun(0, 2, a, b, None, (narrow,))]))
