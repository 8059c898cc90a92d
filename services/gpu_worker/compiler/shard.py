"""The layer of one rank of a tensor-parallel group: its graph, with the sums over the ranks in it.

The backbone's are Megatron's (arXiv 1909.08053): behind o and down an all-reduce, whose adjoint is the identity,
and in front of qkv and gate_up the identity, whose adjoint is an all-reduce. Low-rank parts may ride in both. What
changes a row-parallel output in any other way than by adding products comes behind the all-reduce. Moves of the
bypasses' own are put in with them, in compiler/trace.py.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from services.gpu_worker.compiler.trace import trace
from services.gpu_worker.model import layer
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import BACKBONE, COLUMN
from services.gpu_worker.model.parallel import shard_config


def trace_rank(config: ModelConfig, tp: int) -> Graph:
    """The layer of one of `tp` ranks of the whole `config`, with every bypass site in it."""
    graph = trace(shard_config(config, tp))
    if tp > 1:
        ctx = next(node for node in graph.nodes if node.name == "ctx")
        for node in list(graph.nodes):
            if node.target is layer.project:
                by_columns = BACKBONE[str(node.args[1].args[1])] is COLUMN
                (_divide_by_columns if by_columns else _divide_by_rows)(graph, node, ctx)
    return graph


def _divide_by_columns(graph: Graph, linear: Node, ctx: Node) -> None:
    source = linear.args[0]
    assert isinstance(source, Node)
    _follow(graph, source, layer.fan_out, ctx)


def _divide_by_rows(graph: Graph, linear: Node, ctx: Node) -> None:
    """Cuts the linear's bypass site in two: a part of the sum, and what needs all of it."""
    site = next(user for user in linear.users if user.target is layer.bypass)
    site.target = layer.bypass_low_rank
    total = _follow(graph, site, layer.all_reduce, ctx)
    _, *others = site.args
    change = _follow(graph, total, layer.bypass_change, *others)
    change.meta["label"] = site.meta.pop("label")


def _follow(graph: Graph, node: Node, target: object, *args: object) -> Node:
    """Puts `target(node, *args)` in the node's place for everybody who reads it."""
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args))  # type: ignore[arg-type]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new
