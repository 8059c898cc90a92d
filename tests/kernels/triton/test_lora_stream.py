"""Low-rank parts of all of a model's linears, tables placed once: the kernel and its torch twin against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.gpu_worker.kernels import lora_stream as torch_twin
from services.gpu_worker.kernels.lora_stream import LoraPairs, LoraStream, StreamRun
from services.gpu_worker.kernels.triton import lora_stream as kernel
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.triton.twins import DTYPES, Numbers, assert_close

both = pytest.mark.parametrize("ops", [torch_twin, kernel], ids=["torch", "triton"])
WIDTHS = [(40, 72), (72, 40)]  # of a layer's two linears
RANKS = [
    [(4, 3), (4, 3)],
    [(20, None), (8, None)],
    [(None, 1), (5, 16)],
]  # of an adapter, by layer and linear
RUNS = [(1, 2, 0), (2, 20, 1), (23, 27, 2), (27, 28, 0)]  # first row, end, adapter
ROUNDINGS = 3  # of intermediates too


def make_stream(draw: Numbers, device: torch.device) -> LoraStream:
    adapters = [
        LoraPairs(
            [
                [
                    None
                    if rank is None
                    else (draw(rank, width, scale=width**-0.5), draw(out, rank, scale=0.5))
                    for rank, (width, out) in zip(ranks, WIDTHS, strict=True)
                ]
                for ranks in layers
            ]
        )
        for layers in RANKS
    ]
    return LoraStream(tuple(StreamRun(start, end, adapters[i]) for start, end, i in RUNS), device)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_run_gets_its_own_adapter_in_every_linear(
    ops: Any, dtype: torch.dtype, device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    stream = make_stream(draw, device)
    for layer in range(2):
        for linear, (width, out) in enumerate(WIDTHS):
            x, y = draw.apart(30, width), draw(30, out)
            exact = y.double()
            for run in stream.runs:
                pair = run.pairs.layers[layer][linear]
                if pair is not None:
                    rows = slice(run.start, run.end)
                    exact[rows] += x[rows].double() @ pair[0].double().T @ pair[1].double().T
            before = y.clone()
            assert ops.add_low_rank_(y, x, stream, layer, linear) is y
            assert_close(y, exact, dtype, ROUNDINGS)
            for free in (slice(0, 1), slice(20, 23), slice(28, 30)):
                assert torch.equal(y[free], before[free])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [kernel.PART, 2 * kernel.PART + 8])
def test_features_of_wide_rows_are_summed_in_parts(
    ops: Any, dtype: torch.dtype, width: int, device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    pairs = [(draw(rank, width, scale=width**-0.5), draw(24, rank, scale=0.5)) for rank in (3, 20)]
    runs = tuple(StreamRun(i, i + 1, LoraPairs([[pair]])) for i, pair in enumerate(pairs))
    x, y = draw(2, width), draw(2, 24)
    exact = y.double()
    for row, (a, b) in enumerate(pairs):
        exact[row] += b.double() @ (a.double() @ x[row].double())
    assert_close(ops.add_low_rank_(y, x, LoraStream(runs, device), 0, 0), exact, dtype, ROUNDINGS)


def test_a_row_is_the_same_bits_whoever_else_is_in_the_stream(device: torch.device) -> None:
    draw = Numbers(torch.float16, device)
    width = 2 * kernel.PART
    pairs = LoraPairs([[(draw(8, width, scale=width**-0.5), draw(16, 8, scale=0.5))]])
    others = LoraPairs([[(draw(20, width, scale=width**-0.5), draw(16, 20, scale=0.5))]])
    x, y = draw(40, width), draw(40, 16)
    together = (StreamRun(0, 39, others), StreamRun(39, 40, pairs))
    found = kernel.add_low_rank_(y.clone(), x, LoraStream(together, device), 0, 0)[39:]
    alone = kernel.add_low_rank_(y[39:].clone(), x[39:], LoraStream((StreamRun(0, 1, pairs),), device), 0, 0)
    assert torch.equal(found, alone)


def test_pairs_are_never_read_for_rows_that_they_do_not_fit(device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    stream = make_stream(draw, device)
    with pytest.raises(UnsupportedShape, match=r"x torch.float32 \[30, 41\] .* for pairs of \(40, 72\)"):
        kernel.add_low_rank_(draw(30, 72), draw(30, 41), stream, 0, 0)
    with pytest.raises(UnsupportedShape, match=r"\[25, 40\] .* are no 28 rows"):
        kernel.add_low_rank_(draw(25, 72), draw(25, 40), stream, 1, 0)


def test_a_pair_without_a_common_rank_is_refused(device: torch.device) -> None:
    draw = Numbers(torch.float32, device)
    with pytest.raises(ValueError, match=r"A \[4, 8\] and B \[8, 3\] are no dense pair"):
        LoraPairs([[(draw(4, 8), draw(8, 3))]])
    with pytest.raises(ValueError, match="pairs of one linear are of"):
        LoraPairs([[(draw(4, 8), draw(8, 4))], [(draw(4, 9), draw(8, 4))]])
