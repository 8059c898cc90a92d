"""`kernels/paged_attention.py` on a GPU: one form for decodes, pieces of prompts and training windows.

A tile is BM rows: the heads of a group times as many tokens of a run as fit (the rest of the rows is masked),
so that all of them read the same keys. Runs that fit into a small tile, as decodes do, get one; all others
get large ones. A tile's keys are cut after a fixed number, however many tiles there are: results do not depend
on who else is in the batch. Parts are merged by a second kernel.
Source: the online softmax of FlashAttention-2 (arXiv 2307.08691), split over keys as in Flash-Decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.paged_attention import RUN_COLUMNS, PagedBatch
from services.gpu_worker.kernels.triton.attention_tiles import (
    COMPILED_SHAPES,
    LOG2E,
    MERGE_COLUMNS,
    TILE_COLUMNS,
    Shapes,
    forward_tiles,
)
from services.gpu_worker.kernels.triton.common import Configuration, dot, pointer

LN2 = tl.constexpr(1 / LOG2E)
OF_RUN = tl.constexpr(RUN_COLUMNS)
OF_TILE = tl.constexpr(TILE_COLUMNS)
OF_MERGE = tl.constexpr(MERGE_COLUMNS)


@triton.jit
def load_run(runs, run):
    """(First row, tokens, keys before the first of them, start of its block table)."""
    at = runs + run * OF_RUN
    num_tokens = tl.load(at + 1)
    return tl.load(at), num_tokens, tl.load(at + 3) - num_tokens, tl.load(at + 4)


@triton.jit
def tile_rows(
    first_row, num_tokens, token, head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr
):
    """Of a tile from `token` of a run on: (its rows of [N * H], their tokens, whether they are there at all)."""
    i = tl.arange(0, BM)
    tokens = token + i // GROUP
    valid = (tokens < num_tokens) & (i < BM // GROUP * GROUP)
    return ((first_row + tokens) * KV_HEADS + head) * GROUP + i % GROUP, tokens, valid


@triton.jit
def load_rows(x, rows, valid, stride, HEADS: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr):
    """[BM, E_PAD] of a tensor [N, H, E] whose tokens are `stride` apart."""
    d = tl.arange(0, E_PAD)
    offsets = (rows // HEADS).to(tl.int64) * stride + rows % HEADS * E
    return tl.load(x + offsets[:, None] + d[None, :], mask=valid[:, None] & (d < E)[None, :], other=0.0)


@triton.jit
def store_rows(x, rows, valid, result, E: tl.constexpr, E_PAD: tl.constexpr):
    """The inverse, into a tensor [N, H, E] in one piece."""
    d = tl.arange(0, E_PAD)
    at = x + rows.to(tl.int64)[:, None] * E + d[None, :]
    tl.store(at, result.to(x.dtype.element_ty), mask=valid[:, None] & (d < E)[None, :])


@triton.jit
def load_keys(
    cached,
    blocks,
    head,
    places,
    valid,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """[BN, E_PAD] of a layer's keys or values: a head's at these places of the block table `blocks`."""
    block = tl.load(blocks + places // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    offsets = ((block * KV_HEADS + head) * BLOCK_SIZE + places % BLOCK_SIZE) * E
    d = tl.arange(0, E_PAD)
    return tl.load(cached + offsets[:, None] + d[None, :], mask=valid[:, None] & (d < E)[None, :], other=0.0)


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    keys,
    values,
    blocks,
    head,
    positions,
    begin,
    end,
    scale,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BN: tl.constexpr,
):
    """Takes the keys [begin, end) into a weighted sum, the sum of weights, and the highest score."""
    for first in range(begin, end, BN):
        places = first + tl.arange(0, BN)
        there = places < end
        k = load_keys(keys, blocks, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
        scores = dot(q, tl.trans(k)) * scale
        if MASKED:
            seen = (places[None, :] <= positions[:, None]) & there[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = load_keys(values, blocks, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
        acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["runs", "blocks", "tiles"])
def _forward(
    q,
    keys,
    values,
    out,
    lse,
    part_out,
    part_lse,
    runs,
    blocks,
    tiles,
    q_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile and key head. `scale` is log2(e) / sqrt(E); part -1 stands for a tile of one part."""
    at = tiles + tl.program_id(0) * OF_TILE
    run, token = tl.load(at), tl.load(at + 1)
    begin, end, part = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    head = tl.program_id(1)
    first_row, num_tokens, before, table = load_run(runs, run)
    rows, tokens, valid = tile_rows(first_row, num_tokens, token, head, KV_HEADS, GROUP, BM)
    tile_q = load_rows(q, rows, valid, q_stride, KV_HEADS * GROUP, E, E_PAD)
    acc = tl.zeros((BM, E_PAD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    # whole tiles of keys that every row sees need no mask
    seen_by_all = tl.minimum(end, before + token + 1)
    middle = begin + tl.maximum(seen_by_all - begin, 0) // BN * BN
    acc, total, top = _attend(
        acc, total, top, tile_q, keys, values, blocks + table, head, before + tokens, begin, middle, scale,
        False, KV_HEADS, BLOCK_SIZE, E, E_PAD, BN,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, tile_q, keys, values, blocks + table, head, before + tokens, middle, end, scale,
        True, KV_HEADS, BLOCK_SIZE, E, E_PAD, BN,
    )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    log2 = top + tl.log2(tl.where(total > 0.0, total, 1.0))
    if part < 0:
        store_rows(out, rows, valid, result, E, E_PAD)
        tl.store(lse + rows, log2 * LN2, mask=valid)
    else:
        own = (part * KV_HEADS + head) * BM + tl.arange(0, BM)
        store_rows(part_out, own, valid, result, E, E_PAD)
        tl.store(part_lse + own, log2, mask=valid)


@triton.jit(do_not_specialize=["runs", "merges"])
def _merge(
    part_out,
    part_lse,
    out,
    lse,
    runs,
    merges,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    """The parts of one tile and key head, each weighted by what its keys weigh together."""
    at = merges + tl.program_id(0) * OF_MERGE
    head = tl.program_id(1)
    first_row, num_tokens, _, _ = load_run(runs, tl.load(at))
    rows, _, valid = tile_rows(first_row, num_tokens, tl.load(at + 1), head, KV_HEADS, GROUP, BM)
    first, count = tl.load(at + 2), tl.load(at + 3)
    acc = tl.zeros((BM, E_PAD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    for part in range(first, first + count):
        own = (part * KV_HEADS + head) * BM + tl.arange(0, BM)
        log2 = tl.load(part_lse + own, mask=valid, other=0.0)
        new_top = tl.maximum(top, log2)  # finite: every row sees the keys of the first part
        weight, shrink = tl.exp2(log2 - new_top), tl.exp2(top - new_top)
        acc = acc * shrink[:, None] + weight[:, None] * load_rows(part_out, own, valid, E, 1, E, E_PAD)
        total = total * shrink + weight
        top = new_top
    store_rows(out, rows, valid, acc / total[:, None], E, E_PAD)
    tl.store(lse + rows, (top + tl.log2(total)) * LN2, mask=valid)


def paged_attention(q_NHE: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """The twin of `paged_attention` in kernels/paged_attention.py. Raises UnsupportedShape."""
    shapes = Shapes.of(q_NHE, keys, values, batch)
    n, h, e = q_NHE.shape
    out = q_NHE.new_empty(n, h * e)
    lse = q_NHE.new_empty(n, h, dtype=torch.float32)
    for form, tiles in batch.plan(("forward", shapes), lambda: forward_tiles(batch, shapes)):
        parts = out.new_empty(tiles.num_parts, shapes.num_kv_heads, form.rows, e, dtype=torch.float32)
        part_lse = parts.new_empty(parts.shape[:-1])
        _forward[(len(tiles.tiles), shapes.num_kv_heads)](
            q_NHE, keys, values, out, lse, parts, part_lse, batch.columns, batch.blocks, tiles.tiles,
            q_NHE.stride(0), shapes.scale * LOG2E, **shapes.constants, **form.options,
        )  # fmt: skip
        if tiles.num_parts:
            _merge[(len(tiles.merges), shapes.num_kv_heads)](
                parts, part_lse, out, lse, batch.columns, tiles.merges,
                BM=form.rows, **shapes.row_constants, num_warps=form.num_warps,
            )  # fmt: skip
    return out, lse


def _configurations() -> Iterator[Configuration]:
    signature = dict.fromkeys(("lse", "part_out", "part_lse"), pointer(torch.float32))
    signature |= dict.fromkeys(("runs", "blocks", "tiles", "merges"), pointer(torch.int32))
    signature |= {"q_stride": "i32", "scale": "fp32"}
    aligned = frozenset({"q_stride"})
    for shapes in COMPILED_SHAPES:
        typed = signature | dict.fromkeys(("q", "keys", "values", "out"), pointer(shapes.dtype))
        for kind, form in zip(("small", "large"), shapes.forward_forms(), strict=True):
            forward = shapes.constants | {"BM": form.rows, "BN": form.keys}
            merge = shapes.row_constants | {"BM": form.rows}
            name, warps, stages = f"{kind} {shapes.name}", form.num_warps, form.num_stages
            yield Configuration(f"attention {name}", _forward, typed, forward, warps, stages, aligned)
            yield Configuration(f"attention merge {name}", _merge, typed, merge, warps)


CONFIGURATIONS = list(_configurations())
