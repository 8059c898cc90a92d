"""Tables that say the kernels of `lora.py` where runs, adapters and accumulators are."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.lora import LoraRun, LoraRuns
from services.gpu_worker.kernels.triton.common import UnsupportedShape

FEW_ROWS, MANY_ROWS = 16, 64  # of a tile, by the runs' mean length
FEW_RANKS, MANY_RANKS = 16, 32  # of a tile, by the largest
TILE_COLUMNS = 3  # run, first row, end
ADAPTER_COLUMNS = 5  # address of A, of B; rank; first row; start in `low`
BLOCK_COLUMNS = 9  # see `_block`
Row = tuple[int, ...]  # of a table


@dataclass(frozen=True, slots=True)
class Blocks:
    """Accumulators that one launch adds to: int64 [M, 9], and the most ranks and features of one."""

    table: Tensor
    ranks: int
    features: int


@dataclass(frozen=True, slots=True)
class Tables:
    tiles: Tensor  # int64 [T, 3]
    adapters: Tensor  # int64 [runs, 5]
    gradients: tuple[Blocks, Blocks]  # of A, and of B
    tile_rows: int
    tile_ranks: int
    aligned: bool  # whether all of A and B start at multiples of 16 bytes


def tables_of(runs: LoraRuns, device: torch.device) -> Tables:
    """Those that `place` has made, or else with a copy of their own."""
    if "triton" not in runs.plans:
        place([runs], device)
    found: Tables = runs.plans["triton"]
    return found


def place(many: Sequence[LoraRuns], device: torch.device) -> None:
    """Makes the tables of several linears' runs and sends them to the device in one copy."""
    listed = [_rows(runs) for runs in many]
    numbers = [number for tables in listed for table in tables for row in table for number in row]
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    sent, start = host.to(device, non_blocking=True), 0
    for runs, tables in zip(many, listed, strict=True):
        parts = []
        for table, columns in zip(
            tables, (TILE_COLUMNS, ADAPTER_COLUMNS, BLOCK_COLUMNS, BLOCK_COLUMNS), strict=True
        ):
            stop = start + len(table) * columns
            parts.append(sent[start:stop].view(-1, columns))
            start = stop
        runs.plans["triton"] = _tables(runs, *parts)


def _tables(runs: LoraRuns, tiles: Tensor, adapters: Tensor, of_a: Tensor, of_b: Tensor) -> Tables:
    shapes = [block.grad.shape for run in runs.runs for block in run.grad_b]
    features, ranks = (max((shape[i] for shape in shapes), default=0) for i in (0, 1))
    gradients = Blocks(of_a, runs.max_rank, runs.in_features), Blocks(of_b, ranks, features)
    weights = [weight for run in runs.runs for weight in (run.a, run.b)]
    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
    tile_ranks = FEW_RANKS if runs.max_rank <= FEW_RANKS else MANY_RANKS
    return Tables(tiles, adapters, gradients, _tile_rows(runs), tile_ranks, aligned)


def _tile_rows(runs: LoraRuns) -> int:
    total = sum(run.num_rows for run in runs.runs)
    return FEW_ROWS if total <= 2 * FEW_ROWS * len(runs.runs) else MANY_ROWS


def _rows(runs: LoraRuns) -> tuple[list[Row], ...]:
    """The tables of tiles, of adapters, and of blocks of A's gradients and of B's."""
    step = _tile_rows(runs)
    tiles: list[Row] = [
        (i, first, run.end) for i, run in enumerate(runs.runs) for first in range(run.start, run.end, step)
    ]
    adapters: list[Row] = []
    of_a: list[Row] = []
    of_b: list[Row] = []
    for run, low in zip(runs.runs, runs.low_starts, strict=False):
        if not (run.a.is_contiguous() and run.b.is_contiguous()):
            raise UnsupportedShape(f"A {list(run.a.shape)} or B {list(run.b.shape)} is not dense")
        adapters.append((run.a.data_ptr(), run.b.data_ptr(), run.rank, run.start, low))
        if run.grad_a is not None:
            whole = BlockGradient(slice(0, runs.in_features), slice(0, run.rank), 1.0, run.grad_a)
            of_a.append(_block(run, low, whole, (run.rank, runs.in_features)))
        of_b += [_block(run, low, block, _shape(block, runs.out_features, run.rank)) for block in run.grad_b]
    return tiles, adapters, of_a, of_b


def _shape(block: BlockGradient, out_features: int, rank: int) -> tuple[int, int]:
    """Of the block of B that it is the gradient of."""
    if not isinstance(block.out, slice):
        raise UnsupportedShape(f"no kernel adds to {list(block.grad.shape)} from rows that do not adjoin")
    return len(range(*block.out.indices(out_features))), len(range(*block.rank.indices(rank)))


def _block(run: LoraRun, low: int, block: BlockGradient, shape: tuple[int, int]) -> Row:
    """First row and end; where the ranks start in `low`, their stride and number; first feature, features;
    address of the accumulator; the scale's bits as float64."""
    grad = block.grad
    if tuple(grad.shape) != shape or grad.dtype != torch.float32 or not grad.is_contiguous():
        raise UnsupportedShape(f"no kernel adds to {grad.dtype} {list(grad.shape)} as dense float32 {shape}")
    assert isinstance(block.out, slice)
    first_rank, first_feature = block.rank.start or 0, block.out.start or 0
    ranks, features = shape if block.grad is run.grad_a else shape[::-1]
    scale = struct.unpack("<q", struct.pack("<d", block.scale))[0]
    return (
        run.start, run.end, low + first_rank, run.rank, ranks,
        first_feature, features, grad.data_ptr(), scale,
    )  # fmt: skip
