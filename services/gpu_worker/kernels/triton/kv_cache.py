"""Writing keys and values into the paged cache while they are rotated; twin in `kernels/kv_cache.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.triton.common import Configuration
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import (
    check_rotation,
    check_shape,
    load_rows,
    rotated,
    rows_of,
    tile_of,
)
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_cache_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    num_tokens,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Axis 0 walks over `ROWS` query heads a program, then over as many key and value heads."""
    columns = tl.arange(0, BLOCK)
    q_programs = tl.cdiv(num_tokens * HEADS, ROWS)
    program = tl.program_id(0)
    dtype = out_ptr.dtype.element_ty
    if program < q_programs:
        rows = program * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_tokens * HEADS)[:, None] & (columns < HALF)[None, :]
        low = load_rows(q_ptr, rows, columns, mask, HEADS, q_stride, q_head_stride)
        high = load_rows(q_ptr + HALF, rows, columns, mask, HEADS, q_stride, q_head_stride)
        angles = (rows // HEADS)[:, None] * (2 * HALF) + columns[None, :]
        low, high = rotated(low, high, cos_ptr, sin_ptr, angles, mask, HALF, False)
        dense = rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
        tl.store(out_ptr + dense, low.to(dtype), mask=mask)
        tl.store(out_ptr + dense + HALF, high.to(dtype), mask=mask)
    else:
        rows = (program - q_programs) * ROWS + tl.arange(0, ROWS)
        inside = rows < num_tokens * KV_HEADS
        mask = inside[:, None] & (columns < HALF)[None, :]
        low = load_rows(k_ptr, rows, columns, mask, KV_HEADS, k_stride, k_head_stride)
        high = load_rows(k_ptr + HALF, rows, columns, mask, KV_HEADS, k_stride, k_head_stride)
        angles = (rows // KV_HEADS)[:, None] * (2 * HALF) + columns[None, :]
        low, high = rotated(low, high, cos_ptr, sin_ptr, angles, mask, HALF, False)
        slots = tl.load(slots_ptr + rows, mask=inside, other=-1)
        mask &= (slots >= 0)[:, None]
        place = slots[:, None] * (2 * HALF) + columns[None, :]
        tl.store(keys_ptr + place, low.to(dtype), mask=mask)
        tl.store(keys_ptr + place + HALF, high.to(dtype), mask=mask)
        low = load_rows(v_ptr, rows, columns, mask, KV_HEADS, v_stride, v_head_stride)
        high = load_rows(v_ptr + HALF, rows, columns, mask, KV_HEADS, v_stride, v_head_stride)
        tl.store(values_ptr + place, low.to(dtype), mask=mask)
        tl.store(values_ptr + place + HALF, high.to(dtype), mask=mask)


def rope_cache_write(
    q_NHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    cos_NE: Tensor,
    sin_NE: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotated queries [N, H, E]; rotated keys, and values, go to `slots` (int64 [N * G]) of one layer's cache,
    those at a slot below 0 nowhere."""
    q, k, v = rows_of("q", q_NHE), rows_of("k", k_NGE), rows_of("v", v_NGE)
    cos, sin = check_rotation(q, cos_NE, sin_NE)
    num_tokens = q_NHE.shape[0]
    check_shape("k", k_NGE, (num_tokens, k.heads, q.width))
    check_shape("v", v_NGE, tuple(k_NGE.shape))
    check_shape("slots", slots, (num_tokens * k.heads,))
    for name, cached in (("keys", keys), ("values", values)):
        if not cached.is_contiguous() or cached.shape[-1] % q.width:
            raise UnsupportedShape(f"{name} {list(cached.shape)} are no dense heads of {q.width}")
    out = torch.empty(q_NHE.shape, dtype=q_NHE.dtype, device=q_NHE.device)
    block, rows, warps = tile_of(q.width // 2)
    strides = q.stride, q.head_stride, k.stride, k.head_stride, v.stride, v.head_stride
    if num_tokens:
        grid = (triton.cdiv(q.count, rows) + triton.cdiv(k.count, rows),)
        _rope_cache_write_kernel[grid](
            q.tensor, k.tensor, v.tensor, cos, sin, slots, out, keys, values, num_tokens, *strides,
            HEADS=q.heads, KV_HEADS=k.heads, HALF=q.width // 2, BLOCK=block, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return out


def _configuration(heads: int, kv_heads: int, width: int) -> Configuration:
    block, rows, warps = tile_of(width // 2)
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": width // 2, "BLOCK": block, "ROWS": rows}
    name = f"rope_cache_write-{heads}-{kv_heads}-{width}"
    return configure(
        name, _rope_cache_write_kernel, constants, num_warps=warps, types={"slots_ptr": torch.int64}
    )


CONFIGURATIONS = [_configuration(9, 3, 64), _configuration(32, 8, 128), _configuration(40, 8, 128)]
