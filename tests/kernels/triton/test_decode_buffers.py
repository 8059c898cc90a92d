"""What a recorded forward over decodes reads is what attention would have planned, and padding that does nothing."""

from __future__ import annotations

import pytest
import torch

from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.kernels.triton.attention_tiles import Shapes, Tiles, query_tiles
from services.gpu_worker.kernels.triton.decode_buffers import NO_MERGE, NO_SLOT, NO_TILE, DecodeBuffers

SHAPES = Shapes(torch.float32, 2, 3, 16, 8)
PART = SHAPES.forward_forms()[0].part


def make_buffers(device: torch.device, max_rows: int = 8) -> DecodeBuffers:
    return DecodeBuffers(SHAPES, max_rows, 5 * PART // 16, (1, 1, 4), device)


def tables_for(num_keys: list[int]) -> list[list[int]]:
    """No two rows share a block."""
    return [[100 * row + page for page in range(-(-n // 16) + 2)] for row, n in enumerate(num_keys)]


@pytest.mark.parametrize(
    "num_keys",
    [[1], [5, 16, 17], [PART, PART + 1, 3], [4 * PART + 7, 2, 2 * PART, PART - 1, 3 * PART]],
    ids=str,
)
def test_tables_are_those_that_attention_plans(num_keys: list[int], device: torch.device) -> None:
    buffers, block_tables = make_buffers(device), tables_for(num_keys)
    shape = buffers.find_shape(num_keys, [])
    assert shape is not None and shape.rows >= len(num_keys)
    buffers.fill(shape, num_keys, block_tables, [])
    found = buffers.tables(shape)
    runs = [Run(1, n, table) for table, n in enumerate(num_keys)]
    batch = PagedBatch.make(runs, [t[:-2] for t in block_tables], 2, 16, device)
    own: Tiles = found.batch.plan(("forward", SHAPES), lambda: [])[0][1]
    planned = query_tiles(batch, SHAPES.group, SHAPES.forward_forms()[0], list(range(len(runs))))

    n = len(num_keys)
    assert found.batch.columns[:n].tolist() == batch.columns.tolist()
    assert found.batch.blocks[: len(batch.blocks)].tolist() == batch.blocks.tolist()
    assert own.tiles[: len(planned.tiles)].tolist() == planned.tiles.tolist()
    assert own.merges[: len(planned.merges)].tolist() == planned.merges.tolist()
    assert own.num_parts >= planned.num_parts
    padding = own.tiles[len(planned.tiles) :].tolist() + own.merges[len(planned.merges) :].tolist()
    assert all(tuple(row) in (NO_TILE, NO_MERGE) for row in padding)
    assert found.positions[:n].tolist() == [count - 1 for count in num_keys]
    expected = [
        (table[(count - 1) // 16] * 2 + head) * 16 + (count - 1) % 16
        for table, count in zip(block_tables, num_keys, strict=True)
        for head in range(2)
    ]
    assert found.slots.tolist() == expected + [NO_SLOT] * (2 * (shape.rows - n))


def test_how_rows_choose_arrives_and_padding_takes_the_most_likely_token(device: torch.device) -> None:
    buffers, num_keys = make_buffers(device), [3, 20, 9]
    rows = SamplingRows.make(
        [0.5, 0.0, 2.0], [7, 0, 1 << 40], [0.9, 1.0, 0.25], [0.0, 0.5, 0.0], [1, (1 << 64) - 1, 5], [3, 20, 9],
        torch.device("cpu"),
    )  # fmt: skip
    shape = buffers.find_shape(num_keys, [])
    assert shape is not None and shape.rows == 4
    for sampling in (rows, None):
        buffers.fill(shape, num_keys, tables_for(num_keys), [], sampling)
        found = buffers.tables(shape).sampling
        for name in SamplingRows.__dataclass_fields__:
            own = getattr(found, name)
            expected = getattr(rows, name).tolist() if sampling else [0, 0, 0]
            assert own.dtype == getattr(rows, name).dtype and own.tolist() == [*expected, 0]


def test_batches_of_like_sizes_have_one_shape(device: torch.device) -> None:
    buffers = make_buffers(device)
    assert buffers.find_shape([3, 9, 40], []) == buffers.find_shape([PART, 1, 2, 8], [])
    assert buffers.find_shape([3] * 9, []) is None
    assert buffers.find_shape([], []) is None
