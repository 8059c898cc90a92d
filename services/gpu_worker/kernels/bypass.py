"""What a PEFT method adds to a frozen linear, for a token stream in which each run of rows has its own.

One linear may compute several projections (q, k and v; gate and up). Their low-rank parts are one pair of
products: `a` stacks theirs and `b` is block-diagonal, with the scaling in it. So every rank and every choice
of targets costs two products, and rows without an adapter cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.norm_rope import accumulation_dtype

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
    "tanh": torch.tanh,
}


Move = Callable[[Tensor, int], Tensor]  # a rank's part of a tensor, and the rows of all of it


@dataclass(frozen=True, slots=True)
class Moves:
    """What ranks that share a model do with the tensors between a bypass's two products; None: nothing."""

    before: Move | None = None
    between: Move | None = None
    after: Move | None = None


@dataclass(slots=True)
class Bottleneck:
    """`up(act(down(source)))` of one projection; its scaling is part of `up_w` and `up_b`."""

    name: str  # of the projection
    rows: slice  # of the linear's output
    activation: str
    parallel: bool  # reads the linear's input; else the projection's output
    down_w: Tensor  # [S, in or out]
    down_b: Tensor  # [S]
    up_w: Tensor  # [out, S]
    up_b: Tensor  # [out]
    moves: Moves = Moves()


@dataclass(slots=True)
class Bypass:
    """Everything that one adapter does to one linear [out, in]; what it does not do is None."""

    a: Tensor | None = None  # [R, in]
    b: Tensor | None = None  # [out, R]
    scale: Tensor | None = None  # [out], times the output after the low-rank part
    shift: Tensor | None = None  # [out], added after that
    input_scale: Tensor | None = None  # [in], times the linear's input
    moves: Moves = Moves()  # of the low-rank part
    bottlenecks: tuple[Bottleneck, ...] = ()
    bases: tuple[
        tuple[str, slice], ...
    ] = ()  # projections that more than an addition changes, and their rows

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A and B, where there is a low-rank part."""
        return None if self.a is None or self.b is None else (self.a, self.b)

    @property
    def size_bytes(self) -> int:
        tensors = [self.a, self.b, self.scale, self.shift, self.input_scale]
        for part in self.bottlenecks:
            tensors += [part.down_w, part.down_b, part.up_w, part.up_b]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def add_low_rank_(self, y: Tensor, x: Tensor, mask: Tensor | None) -> None:
        """`y` [n, out] += the low-rank part of `x` [n, in]; `mask` [n, in] multiplies what it reads."""
        if self.a is None or self.b is None:
            return
        moves, rows = self.moves, y.shape[0]
        read = _moved(x if mask is None else x * mask, moves.before, rows)
        low = _moved(read @ self.a.T, moves.between, rows)
        if moves.after is None:
            y.addmm_(low, self.b.T)
        else:
            y.add_(moves.after(low @ self.b.T, rows))

    def change_(self, y: Tensor, x: Tensor) -> None:
        """The rest: scales `y` and adds the bottlenecks' parts, in place."""
        if self.scale is not None:
            y.mul_(self.scale)
        if self.shift is not None:
            y.add_(self.shift)
        for part in self.bottlenecks:
            target = y[:, part.rows]
            moves, rows = part.moves, y.shape[0]
            read = _moved(x if part.parallel else target, moves.before, rows)
            low = _moved(linear(read, part.down_w, part.down_b), moves.between, rows)
            up = linear(ACTIVATE[part.activation](low), part.up_w, part.up_b)
            target.add_(_moved(up, moves.after, rows))


def _moved(x: Tensor, move: Move | None, rows: int) -> Tensor:
    return x if move is None else move(x, rows)


# --- the same as operations of a program: functional, with a form in place for operands read no more


def fetch(bypasses: dict[str, Bypass], group: str, role: str) -> Tensor:
    """A tensor of a layer's bypasses: a, b, scale or input_scale."""
    tensor: Tensor = getattr(bypasses[group], role)
    return tensor


def fetch_rows(bypasses: dict[str, Bypass], group: str, role: str, start: int, stop: int) -> Tensor:
    """Of a vector that several projections share, one projection's."""
    return fetch(bypasses, group, role)[start:stop]


def fetch_bottleneck(bypasses: dict[str, Bypass], group: str, name: str, role: str) -> Tensor:
    part = next(part for part in bypasses[group].bottlenecks if part.name == name)
    tensor: Tensor = getattr(part, role)
    return tensor


def fetch_bias(weight: FrozenLinear, start: int, stop: int) -> Tensor | None:
    return None if weight.bias is None else weight.bias[start:stop]


def lora_down(x: Tensor, a: Tensor) -> Tensor:
    """[N, in] -> [N, R]."""
    return x @ a.T


def lora_up(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """`y` [N, out] + `low` [N, R] `b`^T."""
    return torch.addmm(y, low, b.T)


def lora_part(low: Tensor, b: Tensor) -> Tensor:
    """What `lora_up` adds, where the ranks have to move it first."""
    return low @ b.T


def lora_up_(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    return y.addmm_(low, b.T)


def lora_up_rows(y: Tensor, low: Tensor, b: Tensor, rows: int) -> Tensor:
    """The first `rows` features of `lora_up`; `y` holds no more."""
    return torch.addmm(y, low, b[:rows].T)


def scale(y: Tensor, factor: Tensor) -> Tensor:
    """Feature by feature."""
    return y * factor


def rescale(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`scale` of what `bias` was added to (DoRA scales the product alone)."""
    return y * factor if bias is None else (y - bias) * factor + bias


def activate(x: Tensor, name: str) -> Tensor:
    return ACTIVATE[name](x)


def activate_backward(dy: Tensor, x: Tensor | None, y: Tensor, name: str) -> Tensor:
    """Gradient of `y = activate(x)`; relu's and tanh's read `y` alone."""
    if name == "relu":
        return dy * (y > 0)
    if name == "tanh":
        return dy * (1 - y.square())
    assert x is not None
    if name == "silu":
        sigmoid = torch.sigmoid(x)
        return dy * (sigmoid + y * (1 - sigmoid))
    gradient: Tensor = torch.ops.aten.gelu_backward(dy, x)
    return gradient


# --- gradients of parameters, summed into accumulators


@dataclass(frozen=True, slots=True)
class BlockGradient:
    """Accumulator of a block of a stacked parameter: rows `out`, columns `rank`."""

    out: slice | Tensor
    rank: slice
    scale: float
    grad: Tensor  # float32 [out, r]


def accumulate_product(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """`grad` [out, in] += `left` [N, out]^T `right` [N, in]."""
    grad.add_(left.T @ right)


def accumulate_blocks(blocks: tuple[BlockGradient, ...], dy: Tensor, low: Tensor) -> None:
    """The gradient of a block-diagonal `b`, block by block: `dy` [N, out], `low` [N, R]."""
    for block in blocks:
        block.grad.add_(dy[:, block.out].T @ low[:, block.rank], alpha=block.scale)


def accumulate_low_rank(
    grad_a: Tensor, grad_b: tuple[BlockGradient, ...], d_low: Tensor, x: Tensor, dy: Tensor, low: Tensor
) -> None:
    """Both gradients of a low-rank part of `x` [N, in], whose intermediate `low` [N, R] has the gradient `d_low`.

    Twin for GPUs: `kernels/triton/lora_gradient.py`.
    """
    accumulate_product(grad_a, d_low, x)
    accumulate_blocks(grad_b, dy, low)


def low_rank_backward_(
    dx: Tensor,
    grad_a: Tensor,
    grad_b: tuple[BlockGradient, ...],
    x: Tensor,
    dy: Tensor,
    low: Tensor,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """All of a low-rank part's backward: `accumulate_low_rank`, and `dx` [N, in] += `dy` [N, out] `b` `a`.

    Twin for GPUs: `kernels/triton/lora_gradient.py`.
    """
    d_low = dy @ b
    accumulate_low_rank(grad_a, grad_b, d_low, x, dy, low)
    return dx.addmm_(d_low, a)


@dataclass(frozen=True, slots=True)
class ScaledGradient:
    """Accumulator of a parameter that is computed with as `scale` times its value."""

    grad: Tensor
    scale: float | Tensor


def accumulate_affine(target: ScaledGradient, dy: Tensor, x: Tensor) -> None:
    """The gradient of a weight [out, in]."""
    target.grad.add_((dy.T @ x).to(target.grad.dtype), alpha=float(target.scale))


def accumulate_bias(target: ScaledGradient, dy: Tensor) -> None:
    """The gradient of a bias [out]."""
    target.grad.add_(dy.sum(0, dtype=accumulation_dtype(dy.dtype)), alpha=float(target.scale))


def accumulate_scale(grad: Tensor, dy: Tensor, y: Tensor) -> None:
    """The gradient of `scale`'s factor [out]."""
    wide = accumulation_dtype(dy.dtype)
    grad.add_((dy.to(wide) * y.to(wide)).sum(0))


def accumulate_magnitude(target: ScaledGradient, dy: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """The gradient of a magnitude [out], of which `rescale`'s factor is a multiple."""
    wide = accumulation_dtype(dy.dtype)
    product = y.to(wide) if bias is None else y.to(wide) - bias.to(wide)
    target.grad.add_((dy.to(wide) * product).sum(0) * target.scale)
