"""The gated activation in one pass over memory; twins in `kernels/norm_rope.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import Rows, check_shape, rows_of
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

FEATURES = 1024  # of a row, a program


@triton.jit
def _silu_mul_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    first_ptr,
    second_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Forward: first = silu(gate) * up. Backward: the gradients of gate and of up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = first_ptr.dtype.element_ty
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    if BACKWARD:
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        d_gate = dy * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(first_ptr + row * width + columns, d_gate.to(dtype), mask=mask)
        tl.store(second_ptr + row * width + columns, (dy * silu).to(dtype), mask=mask)
    else:
        tl.store(first_ptr + row * width + columns, (silu * up).to(dtype), mask=mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, F] each."""
    first, second = _matrices(gate=gate, up=up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(first, first, second, out, out, backward=False)
    return out


def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `silu_mul` with respect to `gate` and `up`."""
    gradient, first, second = _matrices(dy=dy, gate=gate, up=up)
    d_gate, d_up = (torch.empty(gate.shape, dtype=dy.dtype, device=gate.device) for _ in range(2))
    _launch(gradient, first, second, d_gate, d_up, backward=True)
    return d_gate, d_up


def _matrices(**tensors: Tensor) -> list[Rows]:
    shape = tuple(next(iter(tensors.values())).shape)
    if len(shape) != 2:
        raise UnsupportedShape(f"{next(iter(tensors))} {list(shape)} is not [N, F]")
    for name, tensor in tensors.items():
        check_shape(name, tensor, shape)
    return [rows_of(name, tensor) for name, tensor in tensors.items()]


def _launch(dy: Rows, gate: Rows, up: Rows, first: Tensor, second: Tensor, backward: bool) -> None:
    block = min(FEATURES, triton.next_power_of_2(gate.width))
    grid = (gate.count, triton.cdiv(gate.width, block))
    if gate.count:
        _silu_mul_kernel[grid](
            dy.tensor, gate.tensor, up.tensor, first, second, dy.stride, gate.stride, up.stride, gate.width,
            BLOCK=block, BACKWARD=backward,
        )  # fmt: skip


CONFIGURATIONS = [
    configure(name, _silu_mul_kernel, {"BLOCK": FEATURES, "BACKWARD": backward})
    for name, backward in (("silu_mul", False), ("silu_mul_backward", True))
]
