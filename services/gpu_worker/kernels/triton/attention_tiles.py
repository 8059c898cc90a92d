"""How a batch's attention is cut into tiles, and for which shapes there are kernels. No kernel is here.

Rows of a tile are the heads of one group times neighbouring tokens of one run. Forms are chosen from what
compiles without spilling (`python -m benchmarks.compile_kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.triton.sizes import TYPES, UnsupportedShape

TILE_COLUMNS = 5
MERGE_COLUMNS = 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = math.log2(math.e)
MAX_HEAD_DIM = 256
MAX_GROUP = 32
SMALL_PART, LARGE_PART = 512, 4096  # keys that one program reads; a multiple of every form's `keys`


@dataclass(frozen=True, slots=True)
class Form:
    """Sizes that a kernel is compiled with."""

    rows: int  # of a tile of queries
    keys: int  # of a tile of keys
    num_warps: int
    num_stages: int
    part: int = 0  # keys of a part of a tile; 0: all

    @property
    def options(self) -> dict[str, int]:
        return {
            "BM": self.rows,
            "BN": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the kernels of attention are compiled for beside their form."""

    dtype: torch.dtype
    num_kv_heads: int
    group: int  # query heads that share a key head
    block_size: int
    head_dim: int

    @classmethod
    def of(cls, q_NHE: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> Shapes:
        """Raises UnsupportedShape for what there is no kernel for."""
        (n, h, e), width = q_NHE.shape, keys.shape[-1]
        said = f"queries {list(q_NHE.shape)} {q_NHE.dtype}, keys {list(keys.shape)} {keys.dtype}"
        if q_NHE.dtype not in DTYPES or not q_NHE.dtype == keys.dtype == values.dtype:
            raise UnsupportedShape(f"attention takes queries and keys of one type of {DTYPES}, not {said}")
        if e > MAX_HEAD_DIM or h % batch.num_kv_heads or h > MAX_GROUP * batch.num_kv_heads:
            raise UnsupportedShape(
                f"attention takes heads of up to {MAX_HEAD_DIM} and 1 to {MAX_GROUP} of them a key head, not "
                f"{said} with {batch.num_kv_heads} key heads"
            )
        if n != batch.num_rows or width != batch.block_size * e or keys.shape != values.shape:
            raise UnsupportedShape(
                f"{said}, values {list(values.shape)} are not those of a batch of {batch.num_rows} rows in "
                f"blocks of {batch.block_size} tokens"
            )
        if q_NHE.stride()[1:] != (e, 1) or not keys.is_contiguous() or not values.is_contiguous():
            raise UnsupportedShape(f"a row's heads and the cache must each lie in one piece: {said}")
        return cls(q_NHE.dtype, batch.num_kv_heads, h // batch.num_kv_heads, batch.block_size, e)

    def check_sums(self, dk: Tensor, dv: Tensor, batch: PagedBatch) -> None:
        """Raises UnsupportedShape for sums over keys and values that the batch's gradients do not fit."""
        num_tokens = max(run.num_keys for run in batch.runs)
        for name, summed in (("dk", dk), ("dv", dv)):
            g, t, e = summed.shape
            said = f"{name} {list(summed.shape)} {summed.dtype} at {list(summed.stride())}"
            if (summed.dtype, g, e) != (torch.float32, self.num_kv_heads, self.head_dim) or t < num_tokens:
                raise UnsupportedShape(
                    f"{said} is no float32 sum over {self.num_kv_heads} heads of {self.head_dim} and at least "
                    f"{num_tokens} tokens"
                )
            if summed.stride() != (dk.stride(0), e, 1):
                raise UnsupportedShape(f"{said}: each head's tokens must lie in one piece")

    @property
    def name(self) -> str:
        return f"{TYPES[self.dtype]} {self.group}x{self.num_kv_heads} heads of {self.head_dim}"

    @property
    def padded_dim(self) -> int:
        return max(16, _power_of_2(self.head_dim))

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def row_constants(self) -> dict[str, int]:
        """Of a kernel that touches no cache."""
        return {
            "KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "E": self.head_dim,
            "E_PAD": self.padded_dim,
        }

    @property
    def constants(self) -> dict[str, int]:
        return self.row_constants | {"BLOCK_SIZE": self.block_size}

    @property
    def fewest_rows(self) -> int:
        """Of a tile: a product takes 16 or more, and one token's heads must fit."""
        return max(16, _power_of_2(self.group))

    def forward_forms(self) -> tuple[Form, Form]:
        """For runs that fit into one small tile, and for all others."""
        rows = self.fewest_rows
        if self.dtype == torch.float32:
            return Form(rows, 32, 8, 3, SMALL_PART), Form(rows, 32, 8, 3, LARGE_PART)
        if self.padded_dim > 128:
            return Form(rows, 32, 4, 2, SMALL_PART), Form(64, 32, 8, 2, LARGE_PART)
        return Form(rows, 64, 4, 3, SMALL_PART), Form(128, 64, 8, 3, LARGE_PART)

    def backward_forms(self) -> tuple[Form, Form]:
        """For the gradient of queries, and for that of keys and values."""
        rows = self.fewest_rows
        if self.dtype == torch.float32:
            return Form(rows, 32, 8, 2), Form(rows, 32, 8, 2)
        if self.padded_dim > 128:
            return Form(32, 32, 8, 1), Form(32, 32, 8, 1)
        return Form(64, 64, 8, 2), Form(64, 64, 8, 2)


COMPILED_SHAPES = (  # for compiling without a GPU
    Shapes(torch.bfloat16, 8, 4, 16, 128),  # Llama 3.1 8B
    Shapes(torch.bfloat16, 8, 5, 16, 128),  # Qwen2.5 14B and 32B
    Shapes(torch.bfloat16, 4, 7, 16, 64),
    Shapes(torch.float16, 8, 8, 16, 96),
    Shapes(torch.bfloat16, 4, 1, 16, 256),
    Shapes(torch.float32, 8, 4, 16, 128),
)


@dataclass(frozen=True, slots=True)
class Tiles:
    """`tiles` int32 [num_tiles, 5]: run, first token, first key, end of keys, and which part of the work space
    it fills, -1 for a tile whose keys are not cut. `merges` int32 [num_merges, 4]: run, first token, first
    part, number of parts."""

    tiles: Tensor
    merges: Tensor
    num_parts: int


def query_tiles(batch: PagedBatch, group: int, form: Form, runs: list[int]) -> Tiles:
    """Tiles of some of the batch's runs, those with the most keys first."""
    tiles: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    num_parts = 0
    for index in runs:
        run = batch.runs[index]
        for token, end in _tokens(run, form.rows // group):
            step = form.part or end
            cuts = [*range(run.first_key, end, step), end]
            if len(cuts) == 2:
                tiles.append((index, token, run.first_key, end, -1))
                continue
            merges.append((index, token, num_parts, len(cuts) - 1))
            for begin, stop in pairwise(cuts):
                tiles.append((index, token, begin, stop, num_parts))
                num_parts += 1
    tiles.sort(key=lambda columns: columns[2] - columns[3])
    both = batch.on_device([i for columns in (*tiles, *merges) for i in columns])
    cut = len(tiles) * TILE_COLUMNS
    return Tiles(both[:cut].view(-1, TILE_COLUMNS), both[cut:].view(-1, MERGE_COLUMNS), num_parts)


def _tokens(run: Run, step: int) -> Iterator[tuple[int, int]]:
    """First token of each tile, and the end of the keys that its last one sees."""
    for token in range(0, run.num_tokens, step):
        yield token, run.num_before + min(token + step, run.num_tokens)


def forward_tiles(batch: PagedBatch, shapes: Shapes) -> list[tuple[Form, Tiles]]:
    """The launches that attention over a batch needs."""
    small, large = shapes.forward_forms()
    fits = [run.num_tokens * shapes.group <= small.rows for run in batch.runs]
    runs = {form: [i for i, fit in enumerate(fits) if fit is (form is small)] for form in (small, large)}
    return [(form, query_tiles(batch, shapes.group, form, own)) for form, own in runs.items() if own]


def key_tiles(batch: PagedBatch, form: Form) -> Tensor:
    """int32 [num_tiles, 2]: run, first key of a tile of keys."""
    tiles = [
        number
        for index, run in enumerate(batch.runs)
        for key in range(run.first_key, run.num_keys, form.keys)
        for number in (index, key)
    ]
    return batch.on_device(tiles).view(-1, 2)


def _power_of_2(number: int) -> int:
    """The lowest one that is not below it."""
    return 1 << (number - 1).bit_length()
