"""What a plan says that a kernel allocates is what Triton's kernel does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from services.gpu_worker.kernels.allocations import ALLOCATIONS
from services.gpu_worker.kernels.backend import Kernels, choose_kernels
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.cross_entropy import LowRankHead
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.triton.sizes import LOW_RANK_PART
from tests.kernels.triton.twins import Numbers
from tests.live_bytes import allocated

Call = Callable[[Kernels], Any]
ROWS, WIDTH, GROUP, KEY_HEADS, E, BLOCK_SIZE = 24, 48, 5, 2, 16, 8
LONGEST = 4400  # more keys than one program of a long run reads


def norms(draw: Numbers, name: str) -> Call:
    x, y, weight = draw(ROWS, WIDTH), draw(ROWS, WIDTH), draw(WIDTH)
    args = (x, weight, 1e-5) if name == "rms_norm" else (x, y, weight, 1e-5)
    return lambda kernels: getattr(kernels, name)(*args)


def activations(draw: Numbers, name: str) -> Call:
    both, dy = draw(ROWS, 2 * WIDTH), draw(ROWS, WIDTH)
    gate, up = both.split(WIDTH, -1)
    args = (gate, up) if name == "silu_mul" else (dy, gate, up)
    return lambda kernels: getattr(kernels, name)(*args)


def rotations(draw: Numbers, name: str) -> Call:
    x, k, cos, sin = draw(ROWS, GROUP, E), draw(ROWS, KEY_HEADS, E), draw(ROWS, E), draw(ROWS, E)
    if name != "rope_cache_write":
        return lambda kernels: getattr(kernels, name)(x, cos, sin)
    keys, values = draw(8 * KEY_HEADS, BLOCK_SIZE * E), draw(8 * KEY_HEADS, BLOCK_SIZE * E)
    slots = torch.arange(ROWS * KEY_HEADS, device=x.device)
    return lambda kernels: kernels.rope_cache_write(x, k, k, cos, sin, slots, keys, values)


def attention(draw: Numbers, name: str) -> Call:
    """Of a window's rows behind many keys, which are cut into parts; of half its rows in a backward."""
    q, d_out = draw(ROWS, GROUP * KEY_HEADS, E), draw(ROWS, GROUP * KEY_HEADS * E)
    runs = (
        [Run(ROWS, LONGEST)] if name == "paged_attention" else [Run(ROWS // 2, 30), Run(ROWS // 2, 50, 0, 30)]
    )
    blocks = list(range(-(-LONGEST // BLOCK_SIZE)))
    keys, values = (draw(len(blocks) * KEY_HEADS, BLOCK_SIZE * E) for _ in range(2))
    batch = PagedBatch.make(runs, [blocks], KEY_HEADS, BLOCK_SIZE, q.device)
    if name == "paged_attention":
        return lambda kernels: kernels.paged_attention(q, keys, values, batch)
    out, lse = draw(*d_out.shape), torch.ones(q.shape[:2], device=q.device)
    dk, dv = (torch.zeros(KEY_HEADS, 64, E, device=q.device) for _ in range(2))
    args = (d_out, q, keys, values, out, lse, batch, dk, dv)
    return lambda kernels: kernels.paged_attention_backward(*args)


def low_rank(draw: Numbers, name: str) -> Call:
    """Blocks that adjoin and one that does not; of a backward the ranks' gradient in three parts."""
    out = 40 if name == "accumulate_low_rank" else 2 * LOW_RANK_PART + 40
    x, dy, low, d_low = draw(ROWS, WIDTH), draw(ROWS, out), draw(ROWS, 8), draw(ROWS, 8)
    grads = [torch.zeros(shape, device=x.device) for shape in ((8, WIDTH), (32, 4), (4, 4))]
    scattered = torch.arange(32, 40, 2, device=x.device)
    blocks = (
        BlockGradient(slice(0, 32), slice(0, 4), 1.0, grads[1]),
        BlockGradient(scattered, slice(4, 8), 1.0, grads[2]),
    )
    if name == "accumulate_low_rank":
        return lambda kernels: kernels.accumulate_low_rank(grads[0], blocks, d_low, x, dy, low)
    args = (draw(ROWS, WIDTH), grads[0], blocks, x, dy, low, draw(8, WIDTH), draw(out, 8))
    return lambda kernels: kernels.low_rank_backward_(*args)


def loss(draw: Numbers, with_gradient: bool, rank: int) -> Call:
    vocabulary = 1000
    x, head = draw(ROWS, WIDTH), DenseLinear(draw(vocabulary, WIDTH))
    labels = torch.arange(ROWS, device=x.device)
    a, b = draw(rank, WIDTH), draw(vocabulary, rank)
    grads = torch.zeros(a.shape, device=x.device), torch.zeros(b.shape, device=x.device)
    adapter = LowRankHead(a, b, 1.0, *grads) if rank else None
    args = (x, head, labels, 1.0, with_gradient, adapter, 256 * ROWS)
    return lambda kernels: kernels.linear_cross_entropy(*args)


CASES: dict[str, Callable[[Numbers, str], Call]] = {
    "rms_norm": norms,
    "add_rms_norm": norms,
    "rms_norm_backward": norms,
    "rope": rotations,
    "rope_backward": rotations,
    "rope_cache_write": rotations,
    "silu_mul": activations,
    "silu_mul_backward": activations,
    "paged_attention": attention,
    "paged_attention_backward": attention,
    "accumulate_low_rank": low_rank,
    "low_rank_backward_": low_rank,
}


def bytes_of(call: Call, kernels: Kernels) -> tuple[int, int]:
    """At the peak, and of what comes back; tables that are made once are there already."""
    call(kernels)
    with allocated() as live:
        result = call(kernels)
        gc.collect()
        held = live.now
    del result
    return live.peak, held


@pytest.mark.parametrize("name", CASES)
def test_a_call_allocates_what_a_plan_says(name: str, device: torch.device) -> None:
    call = CASES[name](Numbers(torch.float16, device), name)
    planned, found = (bytes_of(call, kernels) for kernels in (ALLOCATIONS, choose_kernels("triton", device)))
    assert found == planned


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_loss_holds_at_its_peak_what_a_plan_says(
    with_gradient: bool, rank: int, device: torch.device
) -> None:
    call = loss(Numbers(torch.float16, device), with_gradient, rank)
    planned, found = (bytes_of(call, kernels) for kernels in (ALLOCATIONS, choose_kernels("triton", device)))
    assert found[1] == planned[1]
    assert found[0] == pytest.approx(planned[0], rel=0.02)
