"""Low-rank parts of all runs of a stream in a launch; twins in `kernels/lora.py`.

Adapters stay where they are: a table of addresses says where. A program does a tile of rows of one run, and
as many of its ranks as the run has, so mixed ranks cost what they are; tiles are padded in registers alone.
Every number of a gradient is one program's, which adds rows in their order: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.lora import LoraRuns
from services.gpu_worker.kernels.triton import lora_tables
from services.gpu_worker.kernels.triton.common import Configuration, UnsupportedShape, dot
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.lora_tables import Tables, tables_of
from services.gpu_worker.kernels.triton.rows import check_floats

WIDTH_TILE = 128  # features that a program multiplies or writes at a time
GRADIENT_ROWS = 32  # that a gradient sums at a time
A, B = 0, 1  # the sides of a low-rank part, and the columns of the table of adapters with their addresses
TILE_COLUMNS = tl.constexpr(lora_tables.TILE_COLUMNS)
ADAPTER_COLUMNS = tl.constexpr(lora_tables.ADAPTER_COLUMNS)
BLOCK_COLUMNS = tl.constexpr(lora_tables.BLOCK_COLUMNS)


@triton.jit
def _weight(adapter, dtype, ranks, features, rank, width, SIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of a tile of A [rank, width], or of B [width, rank]; `ranks` and `features` broadcast."""
    base = tl.load(adapter + SIDE).to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    if SIDE == 0:
        return base + ranks * width + features
    else:
        return base + features * rank + ranks


@triton.jit(do_not_specialize=["tiles_ptr", "adapters_ptr"])
def _shrink_kernel(
    x_ptr,
    low_ptr,
    tiles_ptr,
    adapters_ptr,
    x_stride,
    width,
    SIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """low = x A^T, or x B: a tile of rows and `RANKS` ranks a program."""
    tile = tiles_ptr + tl.program_id(0) * TILE_COLUMNS
    end = tl.load(tile + 2)
    adapter = adapters_ptr + tl.load(tile) * ADAPTER_COLUMNS
    rank = tl.load(adapter + 2).to(tl.int32)
    first_rank = tl.program_id(1) * RANKS
    if first_rank < rank:
        rows = tl.load(tile + 1) + tl.arange(0, ROWS)
        ranks = first_rank + tl.arange(0, RANKS)
        dtype = x_ptr.dtype.element_ty
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows < end)[:, None] & (columns < width)[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
            inside = (columns < width)[:, None] & (ranks < rank)[None, :]
            place = _weight(adapter, dtype, ranks[None, :], columns[:, None], rank, width, SIDE, ALIGNED)
            total += dot(x, tl.load(place, mask=inside, other=0.0))
        low = low_ptr + tl.load(adapter + 4) + (rows - tl.load(adapter + 3))[:, None] * rank + ranks[None, :]
        tl.store(
            low, total.to(low_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (ranks < rank)[None, :]
        )


@triton.jit(do_not_specialize=["tiles_ptr", "adapters_ptr"])
def _expand_kernel(
    y_ptr,
    low_ptr,
    tiles_ptr,
    adapters_ptr,
    y_stride,
    width,
    SIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y += low B^T, or low A: a tile of rows and `COLUMNS` features a program."""
    tile = tiles_ptr + tl.program_id(0) * TILE_COLUMNS
    end = tl.load(tile + 2)
    adapter = adapters_ptr + tl.load(tile) * ADAPTER_COLUMNS
    rank = tl.load(adapter + 2).to(tl.int32)
    if (rank > 0) & (tl.load(tile + 1) < end):  # else there is nothing to add
        rows = tl.load(tile + 1) + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        low = low_ptr + tl.load(adapter + 4) + (rows - tl.load(adapter + 3))[:, None] * rank
        dtype = y_ptr.dtype.element_ty
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            inside = (rows < end)[:, None] & (ranks < rank)[None, :]
            part = tl.load(low + ranks[None, :], mask=inside, other=0.0)
            inside = (columns < width)[None, :] & (ranks < rank)[:, None]
            place = _weight(adapter, dtype, ranks[:, None], columns[None, :], rank, width, SIDE, ALIGNED)
            total += dot(part, tl.load(place, mask=inside, other=0.0))
        inside = (rows < end)[:, None] & (columns < width)[None, :]
        place = y_ptr + rows[:, None] * y_stride + columns[None, :]
        y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(place, y.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["blocks_ptr"])
def _gradient_kernel(
    low_ptr,
    wide_ptr,
    blocks_ptr,
    wide_stride,
    RANK_MAJOR: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad += scale * low^T wide over a run's rows, [rank, features] or its transpose: a tile a program."""
    block = blocks_ptr + tl.program_id(0) * BLOCK_COLUMNS
    start, end = tl.load(block), tl.load(block + 1)
    low = low_ptr + tl.load(block + 2)
    low_stride = tl.load(block + 3)
    num_ranks, num_features = tl.load(block + 4), tl.load(block + 6)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    features = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if (tl.program_id(1) * RANKS < num_ranks) & (tl.program_id(2) * COLUMNS < num_features):
        wide = wide_ptr + tl.load(block + 5) + features[None, :]
        total = tl.zeros((RANKS, COLUMNS), tl.float32)
        for row in range(0, (end - start).to(tl.int32), ROWS):
            rows = row + tl.arange(0, ROWS)
            here = rows < end - start
            inside = (ranks < num_ranks)[:, None] & here[None, :]
            left = tl.load(low + rows[None, :] * low_stride + ranks[:, None], mask=inside, other=0.0)
            inside = here[:, None] & (features < num_features)[None, :]
            right = tl.load(wide + (start + rows)[:, None] * wide_stride, mask=inside, other=0.0)
            total += dot(left, right)
        scale = tl.load(block + 8).to(tl.float64, bitcast=True).to(tl.float32)
        grad = tl.load(block + 7).to(tl.pointer_type(tl.float32))
        if RANK_MAJOR:
            place = grad + ranks[:, None] * num_features + features[None, :]
        else:
            place = grad + features[None, :] * num_ranks + ranks[:, None]
        inside = (ranks < num_ranks)[:, None] & (features < num_features)[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total * scale, mask=inside)


def lora_shrink(x: Tensor, runs: LoraRuns) -> Tensor:
    """`x` [N, in] times each run's A^T, as the flat intermediates."""
    x = _stream("x", x, runs, runs.in_features)
    low = runs.new_low(x)
    _shrink(x, low, runs, A)
    return low


def lora_expand_(y: Tensor, low: Tensor, runs: LoraRuns) -> Tensor:
    """`y` [N, out] += the intermediates times each run's B^T; rows of no run stay."""
    _expand(y, low, runs, B)
    return y


def lora_backward_(dx: Tensor | None, dy: Tensor, x: Tensor, low: Tensor, runs: LoraRuns) -> None:
    """Adds the gradients of `lora_expand_(y, lora_shrink(x))`: to `dx` [N, in], where anybody wants it, and to the
    runs' accumulators. `low` is what `lora_shrink(x)` gave."""
    dy, x = _stream("dy", dy, runs, runs.out_features), _stream("x", x, runs, runs.in_features)
    d_low = runs.new_low(x)
    _shrink(dy, d_low, runs, B)
    _accumulate(d_low, x, runs, A)
    _accumulate(low, dy, runs, B)
    if dx is not None:
        _expand(dx, d_low, runs, A)


def _stream(name: str, x: Tensor, runs: LoraRuns, width: int) -> Tensor:
    """`x` with dense rows, of the adapters' type and width."""
    check_floats(name, x)
    last = runs.runs[-1].end if runs.runs else 0
    if x.ndim != 2 or (runs.runs and (x.shape[1] != width or x.shape[0] < last)):
        raise UnsupportedShape(f"{name} {list(x.shape)} is no stream of {last} rows or more of {width}")
    types = {weight.dtype for run in runs.runs for weight in (run.a, run.b)}
    if types - {x.dtype}:
        raise UnsupportedShape(f"{name} {list(x.shape)} is {x.dtype} and adapters are {types}")
    return x if x.stride(1) == 1 else x.contiguous()


def _shrink(x: Tensor, low: Tensor, runs: LoraRuns, side: int) -> None:
    tables = tables_of(runs, x.device)
    if runs.runs:
        _shrink_kernel[len(tables.tiles), triton.cdiv(runs.max_rank, tables.tile_ranks)](
            x, low, tables.tiles, tables.adapters, x.stride(0), x.shape[1], **_tile(tables, side)
        )


def _expand(y: Tensor, low: Tensor, runs: LoraRuns, side: int) -> None:
    width = runs.out_features if side == B else runs.in_features
    if _stream("y", y, runs, width) is not y:
        raise UnsupportedShape(f"the rows of {list(y.shape)} are not dense: they cannot be added to")
    tables = tables_of(runs, y.device)
    if runs.runs:
        _expand_kernel[len(tables.tiles), triton.cdiv(width, WIDTH_TILE)](
            y, low, tables.tiles, tables.adapters, y.stride(0), width, **_tile(tables, side)
        )


def _tile(tables: Tables, side: int) -> dict[str, int | bool]:
    tile = {"ROWS": tables.tile_rows, "RANKS": tables.tile_ranks, "COLUMNS": WIDTH_TILE}
    return {"SIDE": side, "ALIGNED": tables.aligned, **tile}


def _accumulate(low: Tensor, wide: Tensor, runs: LoraRuns, side: int) -> None:
    tables = tables_of(runs, wide.device)
    blocks = tables.gradients[side]
    if len(blocks.table):
        ranks, columns = tables.tile_ranks, WIDTH_TILE
        grid = (len(blocks.table), triton.cdiv(blocks.ranks, ranks), triton.cdiv(blocks.features, columns))
        _gradient_kernel[grid](
            low, wide, blocks.table, wide.stride(0),
            RANK_MAJOR=side == A, ROWS=GRADIENT_ROWS, RANKS=ranks, COLUMNS=columns,
        )  # fmt: skip


def _products(rows: int, ranks: int, dtype: torch.dtype) -> list[Configuration]:
    tables = {"tiles_ptr": torch.int64, "adapters_ptr": torch.int64}
    found = []
    for side in (A, B):
        tile = {"ROWS": rows, "RANKS": ranks, "COLUMNS": WIDTH_TILE}
        constants = {"SIDE": side, "ALIGNED": True, **tile}
        for name, kernel in (("shrink", _shrink_kernel), ("expand", _expand_kernel)):
            title = f"lora_{name}-{'ab'[side]}-{rows}-{ranks}"
            found.append(configure(title, kernel, constants, dtype, types=tables))
    return found


def _gradients(ranks: int, dtype: torch.dtype) -> list[Configuration]:
    tile = {"ROWS": GRADIENT_ROWS, "RANKS": ranks, "COLUMNS": WIDTH_TILE}
    return [
        configure(
            f"lora_gradient-{'ab'[side]}-{ranks}",
            _gradient_kernel,
            {"RANK_MAJOR": side == A, **tile},
            dtype,
            types={"blocks_ptr": torch.int64},
        )
        for side in (A, B)
    ]


CONFIGURATIONS = [
    each
    for dtype in (torch.bfloat16, torch.float32)
    for ranks in (lora_tables.FEW_RANKS, lora_tables.MANY_RANKS)
    for each in [
        *_products(lora_tables.FEW_ROWS, ranks, dtype),
        *_products(lora_tables.MANY_ROWS, ranks, dtype),
        *_gradients(ranks, dtype),
    ]
]
