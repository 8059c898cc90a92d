"""Normalisation, rotation and activation: the kernels and their torch twins against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.kernels import kv_cache as torch_cache
from services.gpu_worker.kernels import norm_rope as torch_twins
from services.gpu_worker.kernels.triton import activation, kv_cache, norm_rope
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.triton.twins import DTYPES, Numbers, assert_close

EPS = 1e-5
KERNELS = SimpleNamespace(**{**vars(activation), **vars(kv_cache), **vars(norm_rope)})
TWINS = SimpleNamespace(**{**vars(torch_cache), **vars(torch_twins)})

both = pytest.mark.parametrize("ops", [TWINS, KERNELS], ids=["torch", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 4), (3, 64), (33, 8), (2, 576), (2, 1025), (5, 3, 64), (17, 5, 16), (2, 7, 128)]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


@both
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradient(
    ops: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    x, dy, weight = draw.apart(*shape), draw.apart(*shape), draw(shape[-1])
    assert_close(ops.rms_norm(x, weight, EPS), exact_norm(*wide(x, weight)), dtype)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact_norm(leaf, weight.double()), leaf, dy.double())
    assert_close(ops.rms_norm_backward(dy, x, weight, EPS), expected, dtype)


@both
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (33, 8), (2, 576), (2, 1025)], ids=str)
def test_a_sum_and_its_norm(
    ops: Any, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    x, y, weight = draw.apart(*shape), draw.apart(*shape, gap=3), draw(shape[-1])
    total, normed = ops.add_rms_norm(x, y, weight, EPS)
    assert_close(total, sum(wide(x, y)), dtype)
    if dtype != torch.bfloat16 or device.type == "cuda":  # Triton's interpreter cuts it and does not round
        assert torch.equal(total, x + y)
    assert_close(normed, exact_norm(*wide(total, weight)), dtype)


def rotation(num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = Numbers(torch.float64, device, seed=1)(num_tokens, width // 2, scale=3).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


@both
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 9, 64), (7, 5, 24), (2, 40, 128)], ids=str)
def test_rope_and_its_adjoint(
    ops: Any, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    x, dy = draw.apart(*shape), draw.apart(*shape)
    cos, sin = rotation(shape[0], shape[2], dtype, device)
    leaf = x.double().requires_grad_()
    expected = exact_rope(leaf, *wide(cos, sin))
    assert_close(ops.rope(x, cos, sin), expected.detach(), dtype)
    (gradient,) = torch.autograd.grad(expected, leaf, dy.double())
    assert_close(ops.rope_backward(dy, cos, sin), gradient, dtype)


@both
@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (10, 2, 24), (7, 1, 128), (4, 4, 16)]
)
def test_rotated_keys_and_values_go_to_their_slots_and_nowhere_else(
    ops: Any, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> None:
    num_tokens, block_size, num_blocks = 5, 4, 6
    draw = Numbers(dtype, device)
    width = (heads + 2 * kv_heads) * head_dim
    parts = draw(num_tokens, width).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    cos, sin = rotation(num_tokens, head_dim, dtype, device)
    cache = torch_cache.KVCache(2, num_blocks, block_size, kv_heads, head_dim, dtype, device)
    slots = cache.slots([5, 5, 0, 2, 2], [2, 3, 0, 3, 1])
    slots[2 * kv_heads : 3 * kv_heads] = -1  # one token has none
    rotated = ops.rope_cache_write(q, k, v, cos, sin, slots, cache.keys[1], cache.values[1])
    assert_close(rotated, exact_rope(*wide(q, cos, sin)), dtype)
    keys = torch.zeros(num_blocks * kv_heads * block_size, head_dim, dtype=torch.float64, device=device)
    values = keys.clone()
    written = slots >= 0
    keys[slots[written]] = exact_rope(*wide(k, cos, sin)).flatten(0, 1)[written]
    values[slots[written]] = v.double().flatten(0, 1)[written]
    assert_close(cache.keys[1].view_as(keys), keys, dtype)
    assert torch.equal(cache.values[1].view_as(values).double(), values)
    assert not cache.keys[0].any() and not cache.values[0].any()


@both
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 1024), (2, 1025), (5, 96)], ids=str)
def test_the_gated_activation_and_its_gradients(
    ops: Any, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    draw = Numbers(dtype, device)
    gate, up = draw(shape[0], 2 * shape[1], scale=3).chunk(2, -1)
    dy = draw.apart(*shape)
    leaves = [tensor.double().requires_grad_() for tensor in (gate, up)]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    assert_close(ops.silu_mul(gate, up), expected.detach(), dtype)
    gradients = torch.autograd.grad(expected, leaves, dy.double())
    for found, gradient in zip(ops.silu_mul_backward(dy, gate, up), gradients, strict=True):
        assert_close(found, gradient, dtype)


@both
def test_extreme_gates_overflow_nowhere(ops: Any, device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], device=device)
    up = torch.ones_like(gate)
    assert ops.silu_mul(gate, up).tolist() == [[0.0, 0.0, 200.0, 1e4]]
    d_gate, _ = ops.silu_mul_backward(up, gate, up)
    assert d_gate.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@both
def test_no_rows_give_no_rows(ops: Any, device: torch.device) -> None:
    x, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert ops.rms_norm(x, weight, EPS).shape == (0, 8)
    assert ops.rms_norm_backward(x, x, weight, EPS).shape == (0, 8)
    assert ops.silu_mul(x, x).shape == (0, 8)
    assert ops.rope(x[:, None], x, x).shape == (0, 1, 8)


def test_what_kernels_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    x, weight = torch.ones(2, 6, device=device), torch.ones(5, device=device)
    with pytest.raises(UnsupportedShape, match=r"weight is \[5\] and not \[6\]"):
        norm_rope.rms_norm(x, weight, EPS)
    with pytest.raises(UnsupportedShape, match=r"x \[2, 6\] is torch.float64"):
        norm_rope.rms_norm(x.double(), weight, EPS)
    with pytest.raises(UnsupportedShape, match=r"cosines is \[2, 5\] and not \[2, 6\]"):
        norm_rope.rope(x[:, None], x[:, :5], x)
    with pytest.raises(UnsupportedShape, match=r"cannot rotate \[2, 1, 5\]"):
        norm_rope.rope(x[:, None, :5], x[:, :5], x[:, :5])
    with pytest.raises(UnsupportedShape, match=r"up is \[2, 5\] and not \[2, 6\]"):
        activation.silu_mul(x, x[:, :5])
