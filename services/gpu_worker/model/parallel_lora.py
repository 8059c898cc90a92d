"""Executes a low-rank bypass in any layout that the compiler may choose, forward and backward.

`x` [N, in], `a` [R, in] and `b` [out, R] are a rank's own parts: `x` in the state of the backbone's tensor, `a`
and `b` as the composition's rules split them. A fused linear's rows are in rank-major order where a rule or a
move divides them (parallel.rank_major_rows).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.gpu_worker.model.layouts import Collective, Composition, Move, Split, State
from services.gpu_worker.model.parallel import Group

_DIM = {State.TOKENS: 0, State.FEATURES: 1}


@dataclass(frozen=True, slots=True)
class KeptLora:
    """What the backward reads, in the states in which the two products read it."""

    x: Tensor
    low: Tensor


def move(x: Tensor, step: Move, shape: tuple[int, int], group: Group) -> Tensor:
    """Changes the state of a tensor whose logical shape is `shape`; a sum over the ranks may happen in place."""
    match step.collective:
        case Collective.KEEP:
            return x
        case Collective.PARTITION:
            return group.part(x, _DIM[step.target])
        case Collective.PAD:
            return group.pad(x, _DIM[step.source], shape[_DIM[step.source]])
        case Collective.REPLICATE:
            return group.broadcast_(x)
        case Collective.ALL_GATHER:
            return group.all_gather(x, _DIM[step.source], shape[_DIM[step.source]])
        case Collective.ALL_REDUCE:
            return group.all_reduce_(x)
        case Collective.REDUCE_SCATTER:
            return group.reduce_scatter(x, _DIM[step.target])
        case Collective.ALL_TO_ALL:
            joined = _DIM[step.source]
            return group.all_to_all(x, _DIM[step.target], joined, shape[joined])


def lora_forward(
    composition: Composition, x: Tensor, a: Tensor, b: Tensor, group: Group
) -> tuple[Tensor, KeptLora]:
    """`x A^T B^T` in the state of the backbone's output, to be added to it."""
    before, between, after = composition.forward
    rows, (inputs, inner, outputs) = x.shape[0], _widths(composition, a, b, group)
    x = move(x, before, (rows, inputs), group)
    low = move(x @ a.T, between, (rows, inner), group)
    y = move(low @ b.T, after, (rows, outputs), group)
    return y, KeptLora(x, low)


def lora_backward(
    composition: Composition,
    dy: Tensor,
    kept: KeptLora,
    a: Tensor,
    b: Tensor,
    grads: tuple[Tensor, Tensor],
    group: Group,
) -> Tensor:
    """The bypass's part of dX, in the state of the backbone's; adds to the gradients of `a` and `b`.

    Gradients of replicated parameters may stay partial until reduce_gradients_.
    """
    before, between, after = composition.backward
    rows, (inputs, inner, outputs) = dy.shape[0], _widths(composition, a, b, group)
    dy = move(dy, before, (rows, outputs), group)
    grads[1].add_(dy.T @ kept.low)
    d_low = move(dy @ b, between, (rows, inner), group)
    grads[0].add_(d_low.T @ kept.x)
    return move(d_low @ a, after, (rows, inputs), group)


def reduce_gradients_(composition: Composition, grads: tuple[Tensor, Tensor], group: Group) -> None:
    """Once an optimizer step: sums what replicated parameters got on other ranks, in place."""
    for rule, grad in zip(composition.rules, grads, strict=True):
        if rule.is_partial_gradient:
            group.all_reduce_(grad)


def _widths(composition: Composition, a: Tensor, b: Tensor, group: Group) -> tuple[int, int, int]:
    """Logical sizes: in, R, out."""
    first, second = composition.rules
    inputs = a.shape[1] * (group.size if first.split is Split.IN else 1)
    outputs = b.shape[0] * (group.size if second.split is Split.OUT else 1)
    return inputs, a.shape[0], outputs
