"""Programs from graphs: plain Python by torch.fx's code generation, run without an interpreter in between."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from services.gpu_worker.compiler.bind import bind
from services.gpu_worker.compiler.operations import FORWARD, IN_PLACE
from services.gpu_worker.compiler.rematerialize import loads, narrowed, recomputed
from services.gpu_worker.compiler.reverse import JointGraph
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.model import layer

Program = Callable[..., Any]


def compile_graph(graph: Graph, kernels: Kernels) -> Program:
    """A function of the graph's placeholders, in their order; its source is `program.__self__.code`."""
    _use_memory_again(graph)
    bind(graph, kernels)
    graph.lint()
    module = GraphModule(torch.nn.Module(), graph)
    program: Program = module.forward
    return program


def emit_backward(joint: JointGraph, kept: set[Node]) -> Graph:
    """The backward as a graph of its own: (dy, w, ctx, p, g, kept) -> the gradient of the layer's input or None.

    `kept[label]` gives a kept tensor's rows. Everything else is computed again right before it is first read.
    """
    return _Emission(joint, kept).run()


class _Emission:
    def __init__(self, joint: JointGraph, kept: set[Node]) -> None:
        self.joint = joint
        self.graph = Graph()
        inputs = {name: self.graph.placeholder(name) for name in ("dy", "w", "ctx", "p", "g")}
        self.kept = self.graph.placeholder("kept")
        self.loaded = loads(joint, kept)
        again = recomputed(joint, kept)
        self.rows = narrowed(again)
        self.copies: dict[Node, Node] = {}
        for node in joint.graph.nodes:
            if node.op == "placeholder" and node.name in inputs:
                self.copies[node] = inputs[node.name]

    def run(self) -> Graph:
        for node in self.joint.backward:
            self._copy(node)
        self.graph.output(None if self.joint.dx is None else self._copy(self.joint.dx))
        return self.graph

    def _copy(self, node: Node) -> Node:
        """The node in the new graph, with everything that it reads before it."""
        if node in self.copies:
            return self.copies[node]
        if node in self.loaded:
            copy = self._load(node)
        elif node in self.rows:
            copy = self._first_rows(node)
        else:
            for source in node.all_input_nodes:
                self._copy(source)
            copy = self.graph.node_copy(node, lambda source: self.copies[source])
            if node.target is layer.split:
                self._shorten(copy, node)
        self.copies[node] = copy
        return copy

    def _load(self, node: Node) -> Node:
        return self.graph.call_function(operator.getitem, (self.kept, node.meta["label"]))

    def _first_rows(self, node: Node) -> Node:
        target = FORWARD[node.target].first_rows  # type: ignore[index]
        assert target is not None
        args = [self._copy(arg) if isinstance(arg, Node) else arg for arg in node.args]
        return self.graph.call_function(target, (*args, self.rows[node]))

    def _shorten(self, copy: Node, node: Node) -> None:
        """A split of fewer features than it was traced with."""
        rows = self.rows.get(node.args[0])  # type: ignore[arg-type]
        if rows is None:
            return
        sizes: list[int] = []
        for size in node.args[1]:  # type: ignore[union-attr]
            if sum(sizes) < rows:
                sizes.append(size)  # type: ignore[arg-type]
        copy.args = (copy.args[0], tuple(sizes))


def _use_memory_again(graph: Graph) -> None:
    """Turns operations into their forms in place where the operand is fresh and nobody reads it afterwards."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    owner: dict[Node, Node] = {}
    last_use: dict[Node, int] = {}
    for node in graph.nodes:
        owner[node] = _owner(node, owner)
        for operand in node.all_input_nodes:
            last_use[owner[operand]] = order[node]
    for node in graph.nodes:
        form = IN_PLACE.get(node.target)
        if form is None:
            continue
        target, index = form
        args = list(node.args)
        if node.target is layer.add and not _is_free(args[index], node, owner, last_use, order):
            args = [args[1], args[0]]  # it adds alike
        if _is_free(args[index], node, owner, last_use, order):
            node.target, node.args = target, tuple(args)
            last_use[owner[args[index]]] = max(last_use[owner[args[index]]], last_use.get(node, 0))
            _merge(owner, node, args[index])


def _owner(node: Node, owner: Mapping[Node, Node]) -> Node:
    """Whose memory a node's value lies in."""
    own = FORWARD.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if (own is not None and own.is_view) or node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, Node)
        return owner[source]
    return node


def _merge(owner: dict[Node, Node], node: Node, operand: Node) -> None:
    """What overwrites a tensor is that tensor from there on."""
    heir = owner[operand]
    for other, root in owner.items():
        if root is node:
            owner[other] = heir


def _is_free(
    operand: Any,
    node: Node,
    owner: Mapping[Node, Node],
    last_use: Mapping[Node, int],
    order: Mapping[Node, int],
) -> bool:
    """Whether the operand was made in this program, whole, and its memory is read by nobody after `node`."""
    if not isinstance(operand, Node) or operand.target is operator.getitem:
        return False
    root = owner[operand]
    return root.op == "call_function" and last_use[root] <= order[node]
