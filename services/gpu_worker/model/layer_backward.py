"""Adjoints of the operations of `model/layer.py`, for the compiler to build backward programs from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from services.gpu_worker.kernels.backend import RmsNormBackward, Rotation
from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.norm_rope import rms_norm_backward, rope_backward
from services.gpu_worker.model.layouts import Move, State


class BackwardContext(Protocol):
    """What a backward program knows beside tensors: the window, and the sums over windows."""

    @property
    def rotation(self) -> tuple[Tensor, Tensor]: ...
    def all_reduce_(self, x: Tensor) -> Tensor: ...
    def move(self, x: Tensor, step: Move, width: int) -> Tensor: ...
    def attend_backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, None]: ...
    def cache_gradient(self) -> tuple[Tensor, Tensor]: ...
    def without_virtual(self, gradient: Tensor) -> Tensor: ...
    def accumulate_virtual(self, grad: Tensor, gradient: Tensor) -> None: ...
    def dropout(self, x: Tensor, group: str) -> Tensor: ...


def project_backward(dy: Tensor, weight: FrozenLinear) -> Tensor:
    """Gradient of `project` with respect to its input."""
    return weight.input_gradient(dy)


def weight_gradient(weight: Any, *reads: Tensor) -> None:
    """Stands for the gradient of a frozen weight in a graph that has not been pruned; never run."""
    raise AssertionError("the gradient of a frozen weight is never computed")


def merge(*parts: Tensor) -> Tensor:
    """Adjoint of `split`."""
    return torch.cat(parts, -1)


def head_norm_backward_by(adjoint: RmsNormBackward) -> RmsNormBackward:
    def head_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        heads = (-1, weight.shape[0])
        return adjoint(dy.unflatten(-1, heads), x.unflatten(-1, heads), weight, eps).flatten(1)

    return head_norm_backward


def rotate_backward_by(adjoint: Rotation) -> Callable[[Tensor, BackwardContext], Tensor]:
    def rotate_backward(dy: Tensor, ctx: BackwardContext) -> Tensor:
        cos, sin = ctx.rotation
        return adjoint(dy.unflatten(-1, (-1, cos.shape[-1])), cos, sin).flatten(1)

    return rotate_backward


head_norm_backward = head_norm_backward_by(rms_norm_backward)
rotate_backward = rotate_backward_by(rope_backward)


def attend_backward(
    do: Tensor, q: Tensor, cached: Any, o: Tensor, lse: Tensor, ctx: BackwardContext
) -> tuple[Tensor, Any]:
    """Gradient of the queries, complete; those of keys and values are added to the context's sums."""
    return ctx.attend_backward(do, q, o, lse)


def cache_gradient(summed: Any, ctx: BackwardContext) -> tuple[Tensor, Tensor]:
    """Gradients of the window's own keys and values, [n, G * E] each, after all later windows."""
    return ctx.cache_gradient()


def virtual_rows_backward(dk: Tensor, dv: Tensor, ctx: BackwardContext) -> tuple[Tensor, Tensor]:
    """Without the rows that prefix tuning has replaced."""
    return ctx.without_virtual(dk), ctx.without_virtual(dv)


def accumulate_prefix(grad: tuple[Tensor, Tensor], dk: Tensor, dv: Tensor, ctx: BackwardContext) -> None:
    """Adds the replaced rows' gradients to those of a layer's learned keys and values."""
    ctx.accumulate_virtual(grad[0], dk)
    ctx.accumulate_virtual(grad[1], dv)


def dropout(x: Tensor, ctx: BackwardContext, group: str) -> Tensor:
    """What a low-rank part reads of `x`; its own adjoint, for the mask is a function of the place."""
    return ctx.dropout(x, group)


def move(
    x: Tensor,
    ctx: BackwardContext,
    there: tuple[State, State],
    back: tuple[State, State],
    width: int,
) -> Tensor:
    """`x`, of `width` features in all, from one state on the ranks to another; its gradient goes `back`.

    The result may lie in the memory of `x`, which nobody else reads where it is a sum.
    """
    return ctx.move(x, Move(*there), width)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def product(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `x weight^T` with respect to `x`."""
    return dy @ weight


def add_product(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(x, dy, weight)


def add_product_(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return x.addmm_(dy, weight)
