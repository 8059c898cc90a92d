"""Neighbouring operations of a forward program that one kernel computes in one pass over memory.

Only programs for kernels that have such forms are rewritten, after everything has been decided on the graph.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from services.gpu_worker.kernels.norm_rope import add_rms_norm, rms_norm
from services.gpu_worker.model import layer


def fuse(graph: Graph) -> None:
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


def _precedes(graph: Graph, node: object, later: Node) -> bool:
    for each in graph.nodes:
        if each is later:
            return False
        if each is node:
            return True
    return False
