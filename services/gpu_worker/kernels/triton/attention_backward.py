"""`kernels/paged_attention_backward.py` on a GPU, without atomics: the same sums in the same order every time.

Probabilities are computed again from the log-sum-exp. One kernel keeps a tile of queries and goes over the
keys, for dQ; one keeps a tile of keys and goes over the run's queries, and adds dK and dV to the sums of the
sequence. No other program has those keys, for runs share none.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.paged_attention import PagedBatch
from services.gpu_worker.kernels.triton.attention import (
    OF_TILE,
    load_keys,
    load_rows,
    load_run,
    store_rows,
    tile_rows,
)
from services.gpu_worker.kernels.triton.attention_tiles import (
    COMPILED_SHAPES,
    LOG2E,
    Shapes,
    Tiles,
    key_tiles,
    query_tiles,
)
from services.gpu_worker.kernels.triton.common import Configuration, dot, pointer

BASE2 = tl.constexpr(LOG2E)
ROWS = 16  # that one program of `_row_sums` takes


@triton.jit(do_not_specialize=["num_rows"])
def _row_sums(d_out, out, sums, num_rows, E: tl.constexpr, E_PAD: tl.constexpr, BM: tl.constexpr):
    """`sums` [rows] = sum over E of d_out * out: what the softmax takes off each gradient of a probability."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, E_PAD)
    offsets = rows[:, None] * E + d[None, :]
    wanted = (rows < num_rows)[:, None] & (d < E)[None, :]
    product = tl.load(d_out + offsets, mask=wanted, other=0.0).to(tl.float32)
    product *= tl.load(out + offsets, mask=wanted, other=0.0).to(tl.float32)
    tl.store(sums + rows, tl.sum(product, 1), mask=rows < num_rows)


@triton.jit
def _query_step(
    dq,
    q,
    do,
    log2,
    sums,
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
    """dq plus what the keys [begin, end) contribute, not yet divided by sqrt(E)."""
    for first in range(begin, end, BN):
        places = first + tl.arange(0, BN)
        there = places < end
        k = load_keys(keys, blocks, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
        probs = tl.exp2(dot(q, tl.trans(k)) * scale - log2[:, None])
        if MASKED:
            seen = (places[None, :] <= positions[:, None]) & there[None, :]
            probs = tl.where(seen, probs, 0.0)
        v = load_keys(values, blocks, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
        ds = probs * (dot(do, tl.trans(v)) - sums[:, None])
        dq += dot(ds.to(k.dtype), k)
    return dq


@triton.jit(do_not_specialize=["runs", "blocks", "tiles"])
def _query_gradient(
    d_out,
    q,
    keys,
    values,
    lse,
    sums,
    dq,
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
    """dQ of one tile of queries and key head. `scale` is 1 / sqrt(E)."""
    at = tiles + tl.program_id(0) * OF_TILE
    run, token, begin, end = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    head = tl.program_id(1)
    first_row, num_tokens, before, table = load_run(runs, run)
    rows, tokens, valid = tile_rows(first_row, num_tokens, token, head, KV_HEADS, GROUP, BM)
    tile_q = load_rows(q, rows, valid, q_stride, KV_HEADS * GROUP, E, E_PAD)
    do = load_rows(d_out, rows, valid, KV_HEADS * GROUP * E, KV_HEADS * GROUP, E, E_PAD)
    log2 = tl.load(lse + rows, mask=valid, other=float("inf")) * BASE2
    row_sums = tl.load(sums + rows, mask=valid, other=0.0)
    seen_by_all = tl.minimum(end, before + token + 1)
    middle = begin + tl.maximum(seen_by_all - begin, 0) // BN * BN
    tile_dq = tl.zeros((BM, E_PAD), tl.float32)
    tile_dq = _query_step(
        tile_dq, tile_q, do, log2, row_sums, keys, values, blocks + table, head, before + tokens,
        begin, middle, scale * BASE2, False, KV_HEADS, BLOCK_SIZE, E, E_PAD, BN,
    )  # fmt: skip
    tile_dq = _query_step(
        tile_dq, tile_q, do, log2, row_sums, keys, values, blocks + table, head, before + tokens,
        middle, end, scale * BASE2, True, KV_HEADS, BLOCK_SIZE, E, E_PAD, BN,
    )  # fmt: skip
    store_rows(dq, rows, valid, tile_dq * scale, E, E_PAD)


@triton.jit
def _key_step(
    dk,
    dv,
    k,
    v,
    d_out,
    q,
    lse,
    sums,
    first_row,
    num_tokens,
    head,
    places,
    begin,
    end,
    q_stride,
    scale,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    """dk, not yet divided by sqrt(E), and dv plus what the run's tokens [begin, end) contribute.

    `places` are those of the keys counted as the run's tokens are, negative before the first of them.
    """
    for token in range(begin, end, BM // GROUP):
        rows, tokens, valid = tile_rows(first_row, num_tokens, token, head, KV_HEADS, GROUP, BM)
        tile_q = load_rows(q, rows, valid, q_stride, KV_HEADS * GROUP, E, E_PAD)
        log2 = tl.load(lse + rows, mask=valid, other=float("inf")) * BASE2  # no row, no probability
        probs = tl.exp2(dot(k, tl.trans(tile_q)) * scale - log2[None, :])
        if MASKED:
            probs = tl.where(places[:, None] <= tokens[None, :], probs, 0.0)
        do = load_rows(d_out, rows, valid, KV_HEADS * GROUP * E, KV_HEADS * GROUP, E, E_PAD)
        dv += dot(probs.to(do.dtype), do)
        row_sums = tl.load(sums + rows, mask=valid, other=0.0)
        ds = probs * (dot(v, tl.trans(do)) - row_sums[None, :])
        dk += dot(ds.to(tile_q.dtype), tile_q)
    return dk, dv


@triton.jit(do_not_specialize=["runs", "blocks", "tiles"])
def _key_gradient(
    d_out,
    q,
    keys,
    values,
    lse,
    sums,
    dk,
    dv,
    runs,
    blocks,
    tiles,
    q_stride,
    head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds dK and dV of one tile of keys and key head to their sums [G, T, E], heads `head_stride` apart."""
    at = tiles + tl.program_id(0) * 2
    run, first = tl.load(at), tl.load(at + 1)
    head = tl.program_id(1)
    first_row, num_tokens, before, table = load_run(runs, run)
    places = first + tl.arange(0, BN)
    there = places < before + num_tokens
    k = load_keys(keys, blocks + table, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
    v = load_keys(values, blocks + table, head, places, there, KV_HEADS, BLOCK_SIZE, E, E_PAD)
    tile_dk = tl.zeros((BN, E_PAD), tl.float32)
    tile_dv = tl.zeros((BN, E_PAD), tl.float32)
    # tokens before `begin` see no key of the tile; those from `middle` on see all of them and need no mask
    STEP: tl.constexpr = BM // GROUP
    begin = tl.maximum(first - before, 0)
    partly = tl.minimum(first + BN - 1 - before, num_tokens) - begin
    middle = begin + (tl.maximum(partly, 0) + STEP - 1) // STEP * STEP
    tile_dk, tile_dv = _key_step(
        tile_dk, tile_dv, k, v, d_out, q, lse, sums, first_row, num_tokens, head, places - before,
        begin, middle,
        q_stride, scale * BASE2, True, KV_HEADS, GROUP, E, E_PAD, BM,
    )  # fmt: skip
    tile_dk, tile_dv = _key_step(
        tile_dk, tile_dv, k, v, d_out, q, lse, sums, first_row, num_tokens, head, places - before,
        middle, num_tokens,
        q_stride, scale * BASE2, False, KV_HEADS, GROUP, E, E_PAD, BM,
    )  # fmt: skip
    d = tl.arange(0, E_PAD)
    offsets = head.to(tl.int64) * head_stride + places[:, None] * E + d[None, :]
    wanted = there[:, None] & (d < E)[None, :]
    tl.store(dk + offsets, tl.load(dk + offsets, mask=wanted) + tile_dk * scale, mask=wanted)
    tl.store(dv + offsets, tl.load(dv + offsets, mask=wanted) + tile_dv, mask=wanted)


def paged_attention_backward(
    d_out: Tensor,
    q_NHE: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse_NH: Tensor,
    batch: PagedBatch,
    dk_GTE: Tensor,
    dv_GTE: Tensor,
) -> Tensor:
    """The twin of `paged_attention_backward` in kernels/paged_attention_backward.py. Raises UnsupportedShape."""
    shapes = Shapes.of(q_NHE, keys, values, batch)
    shapes.check_sums(dk_GTE, dv_GTE, batch)
    n, h, e = q_NHE.shape
    d_out, out, lse = d_out.contiguous(), out.contiguous(), lse_NH.contiguous()
    sums = torch.empty_like(lse)
    _row_sums[(triton.cdiv(n * h, ROWS),)](d_out, out, sums, n * h, E=e, E_PAD=shapes.padded_dim, BM=ROWS)
    dq = q_NHE.new_empty(n, h, e)
    queries, keys_tiles = batch.plan(("backward", shapes), lambda: _tiles(batch, shapes))
    for_queries, for_keys = shapes.backward_forms()
    _query_gradient[(len(queries.tiles), shapes.num_kv_heads)](
        d_out, q_NHE, keys, values, lse, sums, dq, batch.columns, batch.blocks, queries.tiles,
        q_NHE.stride(0), shapes.scale, **shapes.constants, **for_queries.options,
    )  # fmt: skip
    _key_gradient[(len(keys_tiles), shapes.num_kv_heads)](
        d_out, q_NHE, keys, values, lse, sums, dk_GTE, dv_GTE, batch.columns, batch.blocks, keys_tiles,
        q_NHE.stride(0), dk_GTE.stride(0), shapes.scale, **shapes.constants, **for_keys.options,
    )  # fmt: skip
    return dq


def _tiles(batch: PagedBatch, shapes: Shapes) -> tuple[Tiles, Tensor]:
    """Raises ValueError for runs of several sequences, whose sums would be the same rows."""
    if len({run.table for run in batch.runs}) > 1:
        raise ValueError("a window's runs are of one block table, whose tokens the sums count")
    for_queries, for_keys = shapes.backward_forms()
    runs = list(range(len(batch.runs)))
    return query_tiles(batch, shapes.group, for_queries, runs), key_tiles(batch, for_keys)


def _configurations() -> Iterator[Configuration]:
    signature = dict.fromkeys(("lse", "sums", "dk", "dv"), pointer(torch.float32))
    signature |= dict.fromkeys(("runs", "blocks", "tiles"), pointer(torch.int32))
    signature |= {"q_stride": "i32", "head_stride": "i32", "num_rows": "i32", "scale": "fp32"}
    aligned = frozenset({"q_stride", "head_stride"})
    for shapes in COMPILED_SHAPES:
        typed = signature | dict.fromkeys(
            ("d_out", "out", "q", "keys", "values", "dq"), pointer(shapes.dtype)
        )
        rows = {"E": shapes.head_dim, "E_PAD": shapes.padded_dim, "BM": ROWS}
        yield Configuration(f"attention row sums {shapes.name}", _row_sums, typed, rows)
        kernels = {"queries": _query_gradient, "keys": _key_gradient}
        for (kind, kernel), form in zip(kernels.items(), shapes.backward_forms(), strict=True):
            constants = shapes.constants | {"BM": form.rows, "BN": form.keys}
            name, warps, stages = f"attention backward {kind} {shapes.name}", form.num_warps, form.num_stages
            yield Configuration(name, kernel, typed, constants, warps, stages, aligned)


CONFIGURATIONS = list(_configurations())
