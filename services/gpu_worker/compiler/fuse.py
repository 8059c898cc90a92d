"""Operations of a program that one kernel computes in one launch, forward or backward.

Only programs for kernels that have such forms are rewritten, after everything has been decided on the graph.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from services.gpu_worker.kernels.bypass import (
    accumulate_blocks,
    accumulate_low_rank,
    accumulate_product,
    low_rank_backward_,
)
from services.gpu_worker.kernels.norm_rope import add_rms_norm, rms_norm
from services.gpu_worker.model import layer
from services.gpu_worker.model.layer_backward import add_product, product, project_backward


def fuse_forward(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target is layer.cache_write:
            _fuse_rotation(graph, node)
        elif node.target is rms_norm:
            _fuse_sum(graph, node)


def _fuse_rotation(graph: Graph, write: Node) -> None:
    """`attend(rotate(q), cache_write(rotate(k), v))`: nobody else may read the rotated keys."""
    args: tuple[Any, ...] = write.args
    keys, v, ctx = args
    attend = next(user for user in write.users if user.target is layer.attend)
    queries: Any = attend.args[0]
    if not (_is_rotation(keys) and _is_rotation(queries) and len(keys.users) == 1 and len(write.users) == 1):
        return
    q, k = queries.args[0], keys.args[0]
    if not all(_precedes(graph, source, queries) for source in (k, v)):
        return
    with graph.inserting_before(queries):
        fused = graph.call_function(layer.rotate_cache_write, (q, k, v, ctx))
    queries.replace_all_uses_with(fused)
    attend.args = (fused, None, ctx)  # it finds the keys in the cache
    for node in (write, keys, queries):
        graph.erase_node(node)


def _is_rotation(node: object) -> bool:
    return isinstance(node, Node) and node.target is layer.rotate


def _fuse_sum(graph: Graph, norm: Node) -> None:
    """`rms_norm(add(x, y))`; others may read the sum."""
    args: tuple[Any, ...] = norm.args
    total, weight, eps = args
    if not (total.op == "call_function" and total.target is layer.add):
        return
    if any(source.op != "placeholder" for source in weight.all_input_nodes):
        return
    total.prepend(weight)
    with graph.inserting_before(total):
        both = graph.call_function(add_rms_norm, (*total.args, weight, eps))
        parts = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    for node, part in zip((total, norm), parts, strict=True):
        node.replace_all_uses_with(part)
    for node in (norm, total):
        graph.erase_node(node)


def fuse_backward(graph: Graph) -> None:
    """The gradients of a linear's A and B, which read nothing that is not there where the later of them stands, and
    with them what its low-rank part adds to the gradient of the input."""
    sums: dict[str, dict[object, Node]] = {}  # by the linear, then by which of the two
    for node in graph.nodes:
        if node.target in (accumulate_product, accumulate_blocks):
            sums.setdefault(_linear_of(node), {})[node.target] = node
    for pair in sums.values():
        of_a, of_b = pair[accumulate_product], pair[accumulate_blocks]
        later = of_b if _precedes(graph, of_a, of_b) else of_a
        with graph.inserting_after(later):
            graph.call_function(
                accumulate_low_rank, (of_a.args[0], of_b.args[0], *of_a.args[1:], *of_b.args[1:])
            )
        for node in (of_a, of_b):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is accumulate_low_rank:
            _fuse_input_gradient(graph, node)


def _fuse_input_gradient(graph: Graph, accumulate: Node) -> None:
    """`add_product(project_backward(dy, w), product(dy, b), a)`, whose inner product the gradient of A reads too, and
    nobody else: neither masks of a dropout nor other ranks come between."""
    args: Any = accumulate.args
    grad_a, grad_b, d_low, x, dy, low = args
    others = [user for user in d_low.users if user is not accumulate]
    if d_low.target is not product or len(others) != 1 or others[0].target is not add_product:
        return
    total: Any = others[0]
    dx, inner, a = total.args
    if inner is not d_low or dx.target is not project_backward or len(dx.users) != 1:
        return
    with graph.inserting_before(total):
        fused = graph.call_function(low_rank_backward_, (dx, grad_a, grad_b, x, dy, low, a, d_low.args[1]))
    total.replace_all_uses_with(fused)
    for node in (total, accumulate, d_low):
        graph.erase_node(node)


def _linear_of(accumulate: Node) -> str:
    """The fused linear whose accumulator, `g["<linear>.a"]` or b, comes first."""
    accumulator: Any = accumulate.args[0]
    return str(accumulator.args[1]).rpartition(".")[0]


def _precedes(graph: Graph, node: object, later: Node) -> bool:
    for each in graph.nodes:
        if each is later:
            return False
        if each is node:
            return True
    return False
