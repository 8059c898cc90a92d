"""`kernels/lora_stream.py` on a GPU: a linear's low-rank parts in two launches, from tables placed once a step.

All linears share one table of tiles; an adapter that leaves a linear alone has the rank 0 there, and its tiles end at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from services.gpu_worker.kernels.lora_stream import LoraStream, StreamRun
from services.gpu_worker.kernels.triton.common import UnsupportedShape
from services.gpu_worker.kernels.triton.lora import WIDTH_TILE, A, B, _expand_kernel, _shrink_kernel
from services.gpu_worker.kernels.triton.lora_tables import (
    FEW_RANKS,
    FEW_ROWS,
    MANY_RANKS,
    MANY_ROWS,
    TILE_COLUMNS,
)
from services.gpu_worker.kernels.triton.rows import check_floats

Stream = tuple[tuple[int, int] | None, torch.dtype, int]  # features in and out, type, rows at least
PLAN = "triton"  # under which a stream keeps its `StreamTables`


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
    low = x.new_empty(tables.low_size)
    adapters = tables.adapters[layer, linear]
    ranks = FEW_RANKS if max_rank <= FEW_RANKS else MANY_RANKS
    tile = {"ALIGNED": tables.aligned, "ROWS": tables.tile_rows, "RANKS": ranks, "COLUMNS": WIDTH_TILE}
    num_tiles = len(tables.tiles)
    _shrink_kernel[num_tiles, triton.cdiv(max_rank, ranks)](
        x, low, tables.tiles, adapters, x.stride(0), x.shape[1], SIDE=A, **tile
    )
    _expand_kernel[num_tiles, triton.cdiv(y.shape[1], WIDTH_TILE)](
        y, low, tables.tiles, adapters, y.stride(0), y.shape[1], SIDE=B, **tile
    )
    return y


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
