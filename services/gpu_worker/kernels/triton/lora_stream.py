"""`kernels/lora_stream.py` on a GPU: a linear's low-rank parts in two launches, from tables placed once a step.

Adapters stay where they are: a table of addresses says where. A program does a tile of rows of one run, and as many of
its ranks as the run has, so mixed ranks cost what they are; tiles are padded in registers alone. All linears share one
table of tiles; an adapter that leaves a linear alone has the rank 0 there, and its tiles end at once.

A few decodes are a few tiles, whose programs would go through a row of thousands of features one after the other while
most of a GPU waits. So rows are cut, always at the same features, whoever else is in the batch; the second launch adds
the parts in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.lora_stream import LoraStream, StreamRun
from services.gpu_worker.kernels.triton.common import Configuration, dot
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import check_floats
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

FEW_ROWS, MANY_ROWS = 16, 64  # of a tile, by the runs' mean length
FEW_RANKS, MANY_RANKS = 16, 32  # of a tile, by the largest
WIDTH_TILE = 128  # features that a program multiplies or writes at a time
PART = 2048  # features that one program of the first launch sums; a multiple of WIDTH_TILE
TILE_COLUMNS = 3  # run, first row, end
ADAPTER_COLUMNS = 5  # addresses of A and B, rank, first row, start in the flat intermediates `low`
OF_TILE, OF_ADAPTER = tl.constexpr(TILE_COLUMNS), tl.constexpr(ADAPTER_COLUMNS)
PLAN = "triton"  # under which a stream keeps its `StreamTables`
Stream = tuple[tuple[int, int] | None, torch.dtype, int]  # features in and out, type, rows at least


@triton.jit
def _weight(address, dtype, ALIGNED: tl.constexpr):
    """Where an A [rank, width] or a B [width, rank] begins, whose address a table holds."""
    base = tl.load(address).to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit(do_not_specialize=["tiles_ptr", "adapters_ptr", "low_size"])
def _shrink_kernel(
    x_ptr,
    low_ptr,
    tiles_ptr,
    adapters_ptr,
    x_stride,
    width,
    low_size,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """low[part] = x A^T over a part of the features, float32: a tile of rows and `RANKS` ranks a program."""
    tile = tiles_ptr + tl.program_id(0) * OF_TILE
    first_row, end = tl.load(tile + 1), tl.load(tile + 2)
    adapter = adapters_ptr + tl.load(tile) * OF_ADAPTER
    rank = tl.load(adapter + 2).to(tl.int32)
    first_rank = tl.program_id(1) * RANKS
    if (first_rank < rank) & (first_row < end):
        rows = first_row + tl.arange(0, ROWS)
        ranks = first_rank + tl.arange(0, RANKS)
        a = _weight(adapter, x_ptr.dtype.element_ty, ALIGNED)
        total = tl.zeros((ROWS, RANKS), tl.float32)
        begin = tl.program_id(2) * PART
        for start in range(begin, tl.minimum(begin + PART, width), COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows < end)[:, None] & (columns < width)[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
            inside = (columns < width)[:, None] & (ranks < rank)[None, :]
            place = a + ranks[None, :] * width + columns[:, None]
            total += dot(x, tl.load(place, mask=inside, other=0.0))
        low = low_ptr + tl.program_id(2).to(tl.int64) * low_size + tl.load(adapter + 4)
        low += (rows - tl.load(adapter + 3))[:, None] * rank + ranks[None, :]
        tl.store(low, total, mask=(rows < end)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["tiles_ptr", "adapters_ptr", "low_size", "num_parts"])
def _expand_kernel(
    y_ptr,
    low_ptr,
    tiles_ptr,
    adapters_ptr,
    y_stride,
    width,
    low_size,
    num_parts,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y += (the sum of low's parts) B^T: a tile of rows and `COLUMNS` features a program."""
    tile = tiles_ptr + tl.program_id(0) * OF_TILE
    end = tl.load(tile + 2)
    adapter = adapters_ptr + tl.load(tile) * OF_ADAPTER
    rank = tl.load(adapter + 2).to(tl.int32)
    if (rank > 0) & (tl.load(tile + 1) < end):  # else there is nothing to add
        rows = tl.load(tile + 1) + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        low = low_ptr + tl.load(adapter + 4) + (rows - tl.load(adapter + 3))[:, None] * rank
        dtype = y_ptr.dtype.element_ty
        b = _weight(adapter + 1, dtype, ALIGNED)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            inside = (rows < end)[:, None] & (ranks < rank)[None, :]
            own = tl.load(low + ranks[None, :], mask=inside, other=0.0)
            for part in range(1, num_parts):
                place = low + tl.cast(part, tl.int64) * low_size + ranks[None, :]
                own += tl.load(place, mask=inside, other=0.0)
            inside = (columns < width)[None, :] & (ranks < rank)[:, None]
            place = b + columns[None, :] * rank + ranks[:, None]
            total += dot(own.to(dtype), tl.load(place, mask=inside, other=0.0))
        inside = (rows < end)[:, None] & (columns < width)[None, :]
        place = y_ptr + rows[:, None] * y_stride + columns[None, :]
        y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(place, y.to(dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class StreamTables:
    tiles: Tensor  # int64 [T, 3]: run, first row, end
    adapters: (
        Tensor  # int64 [layers, linears, runs, 5]: addresses of A and B, rank, first row, start in `low`
    )
    max_ranks: tuple[int, ...]  # by linear
    low_size: int  # of the linear with the largest intermediates
    tile_rows: int
    aligned: bool  # whether all of A and B start at multiples of 16 bytes
    streams: tuple[
        Stream, ...
    ] = ()  # what the pairs of each linear are for; none where that has been checked

    def sent(self, device: torch.device) -> StreamTables:
        """The same on the device, in one copy that the host does not wait for."""
        flat = torch.cat([self.tiles.flatten(), self.adapters.flatten()])
        flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
        tiles, adapters = flat.split([self.tiles.numel(), self.adapters.numel()])
        return replace(self, tiles=tiles.view_as(self.tiles), adapters=adapters.view_as(self.adapters))


def tables_of(runs: Sequence[StreamRun], tile_rows: int = 0) -> StreamTables:
    """On the host; `tile_rows` 0: by the runs' mean length."""
    addresses = torch.stack([run.pairs.addresses for run in runs], 2)  # [layers, linears, runs, 3]
    ranks = addresses[..., 2]
    starts = torch.tensor([run.start for run in runs])
    sizes = ranks * (torch.tensor([run.end for run in runs]) - starts)
    low_starts = sizes.cumsum(-1) - sizes
    adapters = torch.cat([addresses, starts.expand_as(ranks)[..., None], low_starts[..., None]], -1)
    step = tile_rows or _tile_rows(runs)
    tiles = [(i, first, run.end) for i, run in enumerate(runs) for first in range(run.start, run.end, step)]
    return StreamTables(
        torch.tensor(tiles, dtype=torch.int64).view(-1, TILE_COLUMNS),
        adapters,
        tuple(ranks.amax((0, 2)).tolist()),
        int(sizes.sum(-1).max()),
        step,
        bool((addresses[..., :2] % 16 == 0).all()),
        tuple(_stream_of(runs, linear) for linear in range(addresses.shape[1])),
    )


def _stream_of(runs: Sequence[StreamRun], linear: int) -> Stream:
    widths = {run.pairs.widths[linear] for run in runs} - {None}
    dtypes = {dtype for run in runs for dtype in run.pairs.dtypes}
    if len(widths) > 1 or len(dtypes) != 1:
        raise UnsupportedShape(f"pairs of one linear are of {widths} and {dtypes}")
    return widths.pop() if widths else None, dtypes.pop(), runs[-1].end


def _tile_rows(runs: Sequence[StreamRun]) -> int:
    total = sum(run.end - run.start for run in runs)
    return FEW_ROWS if total <= 2 * FEW_ROWS * len(runs) else MANY_ROWS


def add_low_rank_(y: Tensor, x: Tensor, stream: LoraStream, layer: int, linear: int) -> Tensor:
    """`y` [N, out] += each run's rows of `x` [N, in] times its A^T B^T; rows of no run stay."""
    if stream.is_empty:
        return y
    tables: StreamTables = stream.plan(PLAN, lambda: tables_of(stream.runs).sent(stream.device))
    max_rank = tables.max_ranks[linear]
    if not max_rank:
        return y
    x = _checked(y, x, tables, linear)
    num_parts = triton.cdiv(x.shape[1], PART)
    low = x.new_empty(num_parts, tables.low_size, dtype=torch.float32)
    adapters = tables.adapters[layer, linear]
    ranks = FEW_RANKS if max_rank <= FEW_RANKS else MANY_RANKS
    tile = _tile(tables.tile_rows, ranks) | {"ALIGNED": tables.aligned}
    num_tiles, low_size = len(tables.tiles), tables.low_size
    _shrink_kernel[num_tiles, triton.cdiv(max_rank, ranks), num_parts](
        x, low, tables.tiles, adapters, x.stride(0), x.shape[1], low_size, PART=PART, **tile
    )
    _expand_kernel[num_tiles, triton.cdiv(y.shape[1], WIDTH_TILE)](
        y, low, tables.tiles, adapters, y.stride(0), y.shape[1], low_size, num_parts, **tile
    )
    return y


def _tile(rows: int, ranks: int) -> dict[str, int]:
    """Many rows of many ranks would not fit into the registers of four warps."""
    warps = 8 if rows == MANY_ROWS else 4
    return {"ROWS": rows, "RANKS": ranks, "COLUMNS": WIDTH_TILE, "num_warps": warps, "num_stages": 3}


def _checked(y: Tensor, x: Tensor, tables: StreamTables, linear: int) -> Tensor:
    """`x` with dense rows. The kernels read pairs by address alone, so the rows must be what these are for."""
    if y.ndim != 2 or y.stride(1) != 1:
        raise UnsupportedShape(f"the rows of y {list(y.shape)} are not dense: they cannot be added to")
    if tables.streams:
        check_floats("x", x)
        widths, dtype, num_rows = tables.streams[linear]
        own = (x.shape[1], y.shape[1]), x.dtype, y.dtype
        if own != (widths, dtype, dtype) or min(len(x), len(y)) < num_rows:
            raise UnsupportedShape(
                f"x {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)} are no {num_rows} rows of {dtype} "
                f"for pairs of {widths}"
            )
    return x if x.stride(1) == 1 else x.contiguous()


def _configurations(rows: int, ranks: int, dtype: torch.dtype) -> list[Configuration]:
    types = {"tiles_ptr": torch.int64, "adapters_ptr": torch.int64, "low_ptr": torch.float32}
    tile = _tile(rows, ranks) | {"ALIGNED": True}
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    kernels = {"shrink": (_shrink_kernel, {"PART": PART}), "expand": (_expand_kernel, {})}
    return [
        configure(f"lora_{name}-{rows}-{ranks}", kernel, tile | own, dtype, warps, stages, types)
        for name, (kernel, own) in kernels.items()
    ]


CONFIGURATIONS = [
    each
    for dtype in (torch.bfloat16, torch.float32)
    for rows in (FEW_ROWS, MANY_ROWS)
    for ranks in (FEW_RANKS, MANY_RANKS)
    for each in _configurations(rows, ranks, dtype)
]
