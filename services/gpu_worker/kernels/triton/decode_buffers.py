"""Where a forward over decodes alone finds what changes from step to step, so that its launches can be recorded.

A recorded launch has fixed addresses and grids. So the tables of attention, of adapters and of sampling lie in memory
of their own, and batches are padded up to a few shapes: with rows that write no key, tiles without a token, merges of
no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from services.gpu_worker.kernels.lora_stream import LoraStream, StreamRun
from services.gpu_worker.kernels.paged_attention import RUN_COLUMNS, PagedBatch, Run, int32_of
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.kernels.triton.attention_tiles import (
    MERGE_COLUMNS,
    TILE_COLUMNS,
    Shapes,
    Tiles,
)
from services.gpu_worker.kernels.triton.lora_stream import FEW_RANKS, FEW_ROWS, PLAN, StreamTables, tables_of
from services.gpu_worker.kernels.triton.lora_stream import TILE_COLUMNS as LORA_TILE_COLUMNS

NO_SLOT = -1
NO_TILE = (0, 1, 0, 0, -1)  # a decode has no token 1, and there are no keys from 0 to 0
NO_MERGE = (0, 1, 0, 0)
DRAW_COLUMNS = 2  # int64: seed, position
FILTER_COLUMNS = 4  # top_k int32; temperature, top_p, min_p float32
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What the launches of a forward are fixed to."""

    rows: int
    tiles: int  # of attention
    is_split: bool  # whether some row's keys are cut into parts
    lora_tiles: int = 0
    ranks: tuple[int, ...] = ()  # most of an adapter, by linear

    def spans(self, num_kv_heads: int) -> dict[str, tuple[int, int]]:
        """Where each table starts and ends, in units of 4 bytes; block tables come last and are as long as they are."""
        sizes = {
            "positions": 2 * self.rows,
            "slots": 2 * self.rows * num_kv_heads,
            "draws": DRAW_COLUMNS * 2 * self.rows,
            "filters": FILTER_COLUMNS * self.rows,
            "columns": RUN_COLUMNS * self.rows,
            "tiles": TILE_COLUMNS * self.tiles,
            "merges": MERGE_COLUMNS * self.rows if self.is_split else 0,
        }
        found, start = {}, 0
        for name, size in sizes.items():
            found[name] = (start, start + size)
            start += size
        return found


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Views of one shape."""

    positions: Tensor  # int64 [rows]
    slots: Tensor  # int64 [rows * G]
    batch: PagedBatch
    stream: LoraStream
    sampling: SamplingRows


class DecodeBuffers:
    """One set for all shapes: no two forwards are under way at once."""

    def __init__(
        self,
        shapes: Shapes,
        max_rows: int,
        max_pages: int,
        adapter_shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        """`max_pages` of a row; `adapter_shape` is that of the model: layers, linears of each, runs at most."""
        self._shapes, self._device = shapes, device
        self._form, _ = shapes.forward_forms()
        self._max_rows, self._max_runs = max_rows, adapter_shape[2]
        most_tiles = max_rows * (1 + max_pages * shapes.block_size // self._form.part)
        largest = DecodeShape(max_rows, _power_of_2(most_tiles), True)
        self._tables = torch.zeros(
            max(end for _, end in largest.spans(shapes.num_kv_heads).values()) + max_rows * max_pages,
            dtype=torch.int32,
            device=device,
        )
        self._lora_tiles = torch.zeros(
            _power_of_2(max_rows), LORA_TILE_COLUMNS, dtype=torch.int64, device=device
        )
        self._adapters = torch.zeros(*adapter_shape, 5, dtype=torch.int64, device=device)
        self._last: tuple[tuple[StreamRun, ...], StreamTables] | None = None
        self._placed: tuple[DecodeShape, tuple[StreamRun, ...]] | None = None

    @property
    def size_bytes(self) -> int:
        return self._tables.nbytes + self._lora_tiles.nbytes + self._adapters.nbytes

    # --- shapes

    def find_shape(self, num_keys: Sequence[int], runs: Sequence[StreamRun]) -> DecodeShape | None:
        """The smallest shape that a batch fits; None where it fits none. `num_keys` of each row, its own included."""
        if not num_keys or len(num_keys) > self._max_rows or len(runs) > self._max_runs:
            return None
        parts = [-(-n // self._form.part) for n in num_keys]
        rows = next((size for size in ROWS if size >= len(num_keys)), None)
        if rows is None or rows > self._max_rows:
            return None
        shape = DecodeShape(rows, max(rows, _power_of_2(sum(parts))), max(parts) > 1)
        if not runs:
            return shape
        tables = self._tables_of(tuple(runs))
        if not tables.aligned:
            return None
        ranks = tuple(max(FEW_RANKS, _power_of_2(rank)) if rank else 0 for rank in tables.max_ranks)
        return replace(shape, lora_tiles=_power_of_2(len(tables.tiles)), ranks=ranks)

    def tables(self, shape: DecodeShape) -> DecodeTables:
        spans = shape.spans(self._shapes.num_kv_heads)

        def view(name: str) -> Tensor:
            return self._tables[slice(*spans[name])]

        tiles = Tiles(
            view("tiles").view(-1, TILE_COLUMNS), view("merges").view(-1, MERGE_COLUMNS),
            shape.tiles if shape.is_split else 0,
        )  # fmt: skip
        batch = PagedBatch(
            (Run(1, 1),) * shape.rows,
            self._shapes.num_kv_heads,
            self._shapes.block_size,
            view("columns").view(-1, RUN_COLUMNS),
            self._tables[self._blocks_start(shape) :],
            {("forward", self._shapes): [(self._form, tiles)]},
        )
        seeds, positions = view("draws").view(torch.int64).view(DRAW_COLUMNS, -1)
        filters = view("filters").view(FILTER_COLUMNS, -1)
        temperature, top_p, min_p = filters[1:].view(torch.float32)
        return DecodeTables(
            view("positions").view(torch.int64),
            view("slots").view(torch.int64),
            batch,
            self._stream(shape),
            SamplingRows(temperature, filters[0], top_p, min_p, seeds, positions),
        )

    def _blocks_start(self, shape: DecodeShape) -> int:
        return max(end for _, end in shape.spans(self._shapes.num_kv_heads).values())

    def _stream(self, shape: DecodeShape) -> LoraStream:
        if not shape.lora_tiles:
            return LoraStream((), self._device)
        tables = StreamTables(
            self._lora_tiles[: shape.lora_tiles], self._adapters, shape.ranks, shape.rows * max(shape.ranks),
            FEW_ROWS, True,
        )  # fmt: skip
        return LoraStream((), self._device, {PLAN: tables})

    # --- a step

    def fill(
        self, shape: DecodeShape, num_keys: Sequence[int], block_tables: Sequence[Sequence[int]],
        runs: Sequence[StreamRun], sampling: SamplingRows | None = None,
    ) -> None:  # fmt: skip
        """Everything that the next forward of this shape reads, in one copy, and one more where adapters change.
        `sampling` is on the host; None: whatever is drawn is not used."""
        size = self._shapes.block_size
        pages = [table[: -(-n // size)] for table, n in zip(block_tables, num_keys, strict=True)]
        counts = torch.tensor([num_keys, [len(own) for own in pages], [own[-1] for own in pages]])
        keys, lengths, last_blocks = counts
        draws, filters = _choices(shape.rows, sampling)
        wide = torch.cat((self._places(shape, keys, last_blocks), draws))
        narrow = filters, self._columns(shape, keys, lengths), *self._cut(shape, keys)
        blocks = int32_of(list(chain.from_iterable(pages)))
        tables = torch.cat([*(part.flatten().to(torch.int32) for part in narrow), blocks])
        start = 2 * len(wide)
        host = torch.empty(start + len(tables), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host[:start].view(torch.int64).copy_(wide)
        host[start:].copy_(tables)
        self._tables[: len(host)].copy_(host, non_blocking=True)
        self._place_adapters(shape, tuple(runs))

    def _places(self, shape: DecodeShape, num_keys: Tensor, blocks: Tensor) -> Tensor:
        """Positions, then slots; `blocks` are those that the rows' own keys go to."""
        heads, size, padding = self._shapes.num_kv_heads, self._shapes.block_size, shape.rows - len(num_keys)
        last = num_keys - 1
        slots = (blocks[:, None] * heads + torch.arange(heads)) * size + (last % size)[:, None]
        return torch.cat(
            [last, last.new_zeros(padding), slots.flatten(), last.new_full((padding * heads,), NO_SLOT)]
        )

    def _columns(self, shape: DecodeShape, num_keys: Tensor, lengths: Tensor) -> Tensor:
        """Of `PagedBatch`, for runs of one row; `lengths` of the block tables."""
        columns = torch.zeros(shape.rows, RUN_COLUMNS, dtype=torch.int64)
        rows, ones = torch.arange(len(num_keys)), torch.ones_like(num_keys)
        own = rows, ones, ones * 0, num_keys, lengths.cumsum(0) - lengths
        columns[: len(num_keys)] = torch.stack(own, 1)
        return columns

    def _cut(self, shape: DecodeShape, num_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles and merges as `query_tiles` has them, the longest tiles first."""
        step = self._form.part
        counts = (num_keys + step - 1) // step
        rows = torch.arange(len(num_keys)).repeat_interleave(counts)
        firsts = counts.cumsum(0) - counts
        begins = (torch.arange(len(rows)) - firsts[rows]) * step
        ends = torch.minimum(begins + step, num_keys[rows])
        is_part = counts[rows] > 1
        parts = torch.where(is_part, is_part.cumsum(0) - 1, -1)
        own = torch.stack((rows, torch.zeros_like(rows), begins, ends, parts), 1)
        tiles = torch.tensor(NO_TILE).repeat(shape.tiles, 1)
        tiles[: len(rows)] = own[(begins - ends).argsort(stable=True)]
        merges = torch.tensor(NO_MERGE).repeat(shape.rows if shape.is_split else 0, 1)
        cut = (counts > 1).nonzero()[:, 0]
        if len(cut):
            merges[: len(cut)] = torch.stack((cut, cut * 0, parts[firsts[cut]], counts[cut]), 1)
        return tiles, merges

    def _tables_of(self, runs: tuple[StreamRun, ...]) -> StreamTables:
        """On the host; mostly those of the step before."""
        if self._last is None or self._last[0] != runs:
            self._last = runs, tables_of(runs, FEW_ROWS)
        return self._last[1]

    def _place_adapters(self, shape: DecodeShape, runs: tuple[StreamRun, ...]) -> None:
        if not runs or self._placed == (shape, runs):
            return
        tables = self._tables_of(runs)
        tiles = torch.zeros(shape.lora_tiles, LORA_TILE_COLUMNS, dtype=torch.int64)
        tiles[: len(tables.tiles)] = tables.tiles
        sent = replace(tables, tiles=tiles).sent(self._device)
        self._lora_tiles[: shape.lora_tiles].copy_(sent.tiles)
        self._adapters[:, :, : len(runs)].copy_(sent.adapters)
        self._placed = shape, runs


def _choices(num_rows: int, sampling: SamplingRows | None) -> tuple[Tensor, Tensor]:
    """Int64 and int32, flat; rows that nobody reads take the most likely token, which costs least."""
    draws = torch.zeros(DRAW_COLUMNS, num_rows, dtype=torch.int64)
    filters = torch.zeros(FILTER_COLUMNS, num_rows, dtype=torch.int32)
    if sampling is not None:
        own = slice(len(sampling.seed))
        draws[:, own] = torch.stack((sampling.seed, sampling.position))
        filters[0, own] = sampling.top_k
        chosen = torch.stack((sampling.temperature, sampling.top_p, sampling.min_p))
        filters[1:, own] = chosen.view(torch.int32)
    return draws.flatten(), filters.flatten()


def _power_of_2(number: int) -> int:
    """The lowest one that is not below it."""
    return 1 << (number - 1).bit_length()
