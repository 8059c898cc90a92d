"""What the compiler knows of each operation: sizes, price, form in place, and its gradient.

A gradient is a rule that adds backward operations to the graph. What such an operation reads of the forward is
what it takes as an argument, so the reserved set is derived from these rules and listed nowhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.compiler.tape import Tape
from services.gpu_worker.kernels import bypass as kernels
from services.gpu_worker.kernels.norm_rope import (
    rms_norm,
    rms_norm_backward,
    silu_mul,
    silu_mul_backward,
)
from services.gpu_worker.model import layer, layer_backward
from services.gpu_worker.model.layouts import Collective, Move

# What a rank could compute while it sends an element: 2 x 2 bytes over NVLink at 450 GB/s, 989 TFLOP/s (H200).
ALL_REDUCE_FLOPS = 8800.0

Cotangents = list[Node | None]  # of an operation's outputs
Widths = tuple[float, ...]  # elements a token of an operation's outputs


@dataclass(frozen=True, slots=True)
class Operation:
    """`widths` and `flops` are per token; `flops` counts a multiply-add as two."""

    widths: Callable[[Node, Sizes], Widths]
    flops: Callable[[Node, Sizes], float]
    gradient: Callable[[Tape, Node, Cotangents], None] | None = None
    in_place: tuple[Callable[..., Any], int] | None = None  # the form, and the operand that it overwrites
    is_view: bool = False  # shares its first operand's memory
    first_rows: Callable[..., Any] | None = None  # the form that computes the first features only


def width(node: Any) -> float:
    """Elements a token of a tensor in an annotated graph."""
    (own,) = node.meta["widths"]
    return float(own)


# --- sizes and prices


def _same(node: Node, sizes: Sizes) -> Widths:
    return (width(node.args[0]),)


def _cheap(per_element: float) -> Callable[[Node, Sizes], float]:
    return lambda node, sizes: per_element * sum(node.meta["widths"])


def _free(node: Node, sizes: Sizes) -> float:
    return 0.0


def _out_features(node: Node, sizes: Sizes) -> Widths:
    """Of a product whose input has fewer elements a token than features, a rank computes as few tokens."""
    weight = node.args[1]
    return (sizes.out_features(weight) * width(node.args[0]) / sizes.in_features(weight),)


def _product(node: Node, sizes: Sizes) -> float:
    return 2 * width(node.args[0]) * sizes.out_features(node.args[1])


def _moved(node: Node, sizes: Sizes) -> Widths:
    return (node.meta["width"],)


def _move_flops(node: Node, sizes: Sizes) -> float:
    """A gather or a scatter sends half of what a sum does, an exchange half of what a rank has."""
    there, whole = node.args[2], node.args[4]
    collective = Move(*there).collective  # type: ignore[misc]
    if collective.is_free:
        return 0.0
    if collective is Collective.ALL_REDUCE:
        return ALL_REDUCE_FLOPS * float(whole)  # type: ignore[arg-type]
    sent = width(node) if collective is Collective.ALL_TO_ALL else float(whole)  # type: ignore[arg-type]
    return ALL_REDUCE_FLOPS * sent / 2


def _split(node: Node, sizes: Sizes) -> Widths:
    parts: Any = node.args[1]
    return tuple(float(part) for part in parts)


# --- gradients


def _rms_norm(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, weight, eps = node.args
    tape.frozen(weight, dy[0], x)
    tape.add(x, tape.call(rms_norm_backward, dy[0], x, weight, eps))


def _head_norm(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, weight, eps = node.args
    tape.frozen(weight, dy[0], x)
    tape.add(x, tape.call(layer_backward.head_norm_backward, dy[0], x, weight, eps))


def _project(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, weight = node.args
    tape.frozen(weight, dy[0], x)
    tape.add(x, tape.call(layer_backward.project_backward, dy[0], weight))


def _split_gradient(tape: Tape, node: Node, dy: Cotangents) -> None:
    assert all(part is not None for part in dy), f"a part of {node} has no gradient"
    tape.add(node.args[0], tape.call(layer_backward.merge, *dy))


def _rotate(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, ctx = node.args
    tape.add(x, tape.call(layer_backward.rotate_backward, dy[0], ctx))


def _virtual_rows(tape: Tape, node: Node, dy: Cotangents) -> None:
    k, v, ctx = node.args
    tape.trainable("prefix", layer_backward.accumulate_prefix, *dy, ctx)
    both = tape.call(layer_backward.virtual_rows_backward, *dy, ctx)
    tape.add(k, tape.item(both, 0))
    tape.add(v, tape.item(both, 1))


def _cache_write(tape: Tape, node: Node, dy: Cotangents) -> None:
    k, v, ctx = node.args
    both = tape.call(layer_backward.cache_gradient, dy[0], ctx)
    tape.add(k, tape.item(both, 0))
    tape.add(v, tape.item(both, 1))


def _attend(tape: Tape, node: Node, dy: Cotangents) -> None:
    q, cached, ctx = node.args
    o, lse = tape.output(node, 0), tape.output(node, 1)
    both = tape.call(layer_backward.attend_backward, dy[0], q, cached, o, lse, ctx)
    tape.add(q, tape.item(both, 0))
    tape.add(cached, tape.item(both, 1))


def _add(tape: Tape, node: Node, dy: Cotangents) -> None:
    for operand in node.args:
        tape.add(operand, dy[0])


def _silu_mul(tape: Tape, node: Node, dy: Cotangents) -> None:
    gate, up = node.args
    both = tape.call(silu_mul_backward, dy[0], gate, up)
    tape.add(gate, tape.item(both, 0))
    tape.add(up, tape.item(both, 1))


def _fan_out(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, ctx = node.args
    tape.add(x, tape.call(layer.all_reduce, dy[0], ctx))


def _all_reduce(tape: Tape, node: Node, dy: Cotangents) -> None:
    tape.add(node.args[0], dy[0])


def _move(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, ctx, there, back, whole = node.args
    tape.add(x, tape.call(layer_backward.move, dy[0], ctx, back, there, whole))


def _lora_down(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, a = node.args
    tape.trainable(tape.parameter(a), kernels.accumulate_product, dy[0], x)
    tape.add(x, tape.call(layer_backward.product, dy[0], a))


def _lora_up(tape: Tape, node: Node, dy: Cotangents) -> None:
    y, low, b = node.args
    tape.trainable(tape.parameter(b), kernels.accumulate_blocks, dy[0], low)
    tape.add(low, tape.call(layer_backward.product, dy[0], b))
    tape.add(y, dy[0])


def _lora_part(tape: Tape, node: Node, dy: Cotangents) -> None:
    low, b = node.args
    tape.trainable(tape.parameter(b), kernels.accumulate_blocks, dy[0], low)
    tape.add(low, tape.call(layer_backward.product, dy[0], b))


def _dropout(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, ctx, group = node.args
    tape.add(x, tape.call(layer_backward.dropout, dy[0], ctx, group))


def _scale(tape: Tape, node: Node, dy: Cotangents) -> None:
    y, factor = node.args
    tape.trainable(tape.parameter(factor), kernels.accumulate_scale, dy[0], y)
    tape.add(y, tape.call(kernels.scale, dy[0], factor))


def _rescale(tape: Tape, node: Node, dy: Cotangents) -> None:
    y, factor, bias = node.args
    tape.trainable(tape.parameter(factor), kernels.accumulate_magnitude, dy[0], y, bias)
    tape.add(y, tape.call(kernels.scale, dy[0], factor))


def _affine(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, weight, bias = node.args
    tape.trainable(tape.parameter(weight), kernels.accumulate_affine, dy[0], x)
    tape.trainable(tape.parameter(bias), kernels.accumulate_bias, dy[0])
    tape.add(x, tape.call(layer_backward.product, dy[0], weight))


def _activate(tape: Tape, node: Node, dy: Cotangents) -> None:
    x, name = node.args
    read = x if name in ("gelu", "silu") else None
    tape.add(x, tape.call(kernels.activate_backward, dy[0], read, node, name))


FORWARD: dict[Callable[..., Any], Operation] = {
    rms_norm: Operation(_same, _cheap(6), _rms_norm),
    layer.head_norm: Operation(_same, _cheap(6), _head_norm),
    layer.project: Operation(_out_features, _product, _project, first_rows=layer.project_rows),
    layer.split: Operation(_split, _free, _split_gradient, is_view=True),
    layer.rotate: Operation(_same, _cheap(3), _rotate),
    layer.virtual_rows: Operation(
        lambda node, sizes: (width(node.args[0]), width(node.args[1])), _cheap(1), _virtual_rows
    ),
    layer.cache_write: Operation(
        lambda node, sizes: (width(node.args[0]) + width(node.args[1]),), _free, _cache_write
    ),
    layer.attend: Operation(
        lambda node, sizes: (width(node.args[0]), sizes.num_heads),
        lambda node, sizes: 4 * sizes.mean_context * width(node.args[0]),
        _attend,
    ),
    layer.add: Operation(_same, _cheap(1), _add, in_place=(layer.add_, 1)),
    silu_mul: Operation(_same, _cheap(5), _silu_mul),
    layer.bypass: Operation(_same, _free, is_view=True),
    layer.bypass_low_rank: Operation(_same, _free, is_view=True),
    layer.bypass_change: Operation(_same, _free, is_view=True),
    layer.bypass_input: Operation(_same, _free, is_view=True),
    layer.fan_out: Operation(_same, _free, _fan_out, is_view=True),
    layer.all_reduce: Operation(
        _same, _cheap(ALL_REDUCE_FLOPS), _all_reduce, in_place=(layer.all_reduce_, 0)
    ),
    layer.keep: Operation(lambda node, sizes: (0.0,), _free),
    layer_backward.move: Operation(_moved, _move_flops, _move, is_view=True),
    kernels.lora_down: Operation(_out_features, _product, _lora_down),
    kernels.lora_part: Operation(_out_features, _product, _lora_part),
    kernels.lora_up: Operation(
        _same,
        lambda node, sizes: 2 * width(node.args[1]) * width(node),
        _lora_up,
        in_place=(kernels.lora_up_, 0),
        first_rows=kernels.lora_up_rows,
    ),
    layer_backward.dropout: Operation(_same, _cheap(2), _dropout),
    kernels.scale: Operation(_same, _cheap(1), _scale),
    kernels.rescale: Operation(_same, _cheap(3), _rescale),
    layer_backward.affine: Operation(_out_features, _product, _affine),
    kernels.activate: Operation(_same, _cheap(4), _activate),
}

# Forms in place of what only programs in reverse contain.
IN_PLACE: dict[Callable[..., Any], tuple[Callable[..., Any], int]] = {
    layer_backward.add_product: (layer_backward.add_product_, 0)
} | {target: own.in_place for target, own in FORWARD.items() if own.in_place is not None}

TRACED: Sequence[Callable[..., Any]] = tuple(FORWARD)


def annotate(nodes: Sequence[Node], sizes: Sizes) -> None:
    """Writes `widths` and `flops` of every forward operation into the nodes' meta data."""
    for node in nodes:
        if node.op == "placeholder" and node.name == "x":
            node.meta.update(widths=(sizes.hidden,), flops=0.0)
        elif node.target is operator.getitem:
            source: Any = node.args[0]
            if "widths" in source.meta:
                node.meta.update(widths=(source.meta["widths"][node.args[1]],), flops=0.0)
        elif node.op == "call_function" and node.target in FORWARD:
            own = FORWARD[node.target]
            node.meta["widths"] = own.widths(node, sizes)
            node.meta["flops"] = own.flops(node, sizes)
