"""The backward of a traced layer, and graph pruning: what a frozen backbone never needs is taken out.

First everything is differentiated, as if every weight were trained. Then the gradients of frozen weights are
dropped, and with them, until nothing changes, every backward operation that reaches no trainable gradient.
What the remaining ones read of the forward is the reserved set. Source: FlexLLM, algorithm 1.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from services.gpu_worker.compiler.operations import FORWARD, annotate
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.compiler.tape import Tape


@dataclass(frozen=True, slots=True)
class JointGraph:
    """A layer's forward and its pruned backward. `dx` is the gradient of the layer's input, where wanted."""

    graph: Graph
    forward: tuple[Node, ...]  # operations in order, whether read or not
    backward: tuple[Node, ...]  # what is left of the reverse, in order
    dx: Node | None
    num_differentiated: int  # backward operations before the pruning

    def reads(self) -> list[Node]:
        """The reserved set: forward tensors that a remaining backward operation reads, in forward order."""
        read = {operand for node in self.backward for operand in node.all_input_nodes}
        return [node for node in self.forward if node in read and "widths" in node.meta]


def differentiate(graph: Graph, sizes: Sizes, needs_input_gradient: bool) -> JointGraph:
    """Extends `graph` by its backward, pruned."""
    annotate(list(graph.nodes), sizes)
    forward = [node for node in graph.nodes if node.op != "output"]
    output = next(node for node in graph.nodes if node.op == "output")
    y, x = output.args[0], forward[0]
    assert isinstance(y, Node)
    graph.erase_node(output)
    tape = Tape(graph)
    tape.gradients[y] = tape.dy
    for node in reversed(forward):
        if node.op == "call_function" and node.target in FORWARD:
            _reverse(tape, node)
    dx = tape.gradients.get(x) if needs_input_gradient else None
    total = sum(1 for node in graph.nodes if _computes_in_reverse(node))
    roots = [*tape.trainable_roots, *([dx] if dx is not None else [])]
    backward = prune(graph, roots)
    return JointGraph(graph, tuple(forward), backward, dx, total)


def _reverse(tape: Tape, node: Node) -> None:
    """Applies the rule of one operation to the gradients of its outputs."""
    rule = FORWARD[node.target].gradient  # type: ignore[index]
    outputs: list[Any] = [node]
    if len(node.meta["widths"]) > 1:
        items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        outputs = [items.get(index) for index in range(len(node.meta["widths"]))]
    cotangents = [tape.gradients.get(out) for out in outputs]
    if any(gradient is not None for gradient in cotangents):
        assert rule is not None, f"{node.target} has no gradient"
        rule(tape, node, cotangents)


def _computes_in_reverse(node: Node) -> bool:
    return "backward" in node.meta and node.target is not operator.getitem


def prune(graph: Graph, roots: list[Node]) -> tuple[Node, ...]:
    """Backward operations that some root needs, in order; all others are erased, the last first."""
    needed = set(roots)
    for node in reversed(graph.nodes):
        if "backward" not in node.meta:
            continue
        if node in needed:
            needed.update(node.all_input_nodes)
        else:
            assert not node.users
            graph.erase_node(node)
    return tuple(node for node in graph.nodes if "backward" in node.meta)
