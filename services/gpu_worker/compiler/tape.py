"""Reverse-mode differentiation of a traced layer: the forward graph grows its backward."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from services.gpu_worker.model.layer import add
from services.gpu_worker.model.layer_backward import add_product, product, weight_gradient


class Tape:
    """Adds backward operations to a graph and keeps each tensor's gradient so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.accumulators = graph.placeholder("g")
        self.dy = graph.placeholder("dy")
        self.gradients: dict[Node, Node] = {}
        self.frozen_roots: list[Node] = []
        self.trainable_roots: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["backward"] = True
        return node

    def item(self, pair: Node, index: int) -> Node:
        return self.call(operator.getitem, pair, index)

    def output(self, node: Node, index: int) -> Node:
        """The forward tensor that is output `index` of an operation with several."""
        return next(user for user in node.users if user.target is operator.getitem and user.args[1] == index)

    def parameter(self, node: Any) -> str:
        """Where the gradient of a bypass's tensor is summed."""
        return str(node.meta["parameter"])

    def add(self, node: Any, gradient: Node | None) -> None:
        """Another part of a tensor's gradient. A low-rank part is added by its own product."""
        if not isinstance(node, Node) or gradient is None:
            return
        own = self.gradients.get(node)
        if own is None:
            self.gradients[node] = gradient
        elif gradient.target is product:
            self.gradients[node] = self.call(add_product, own, *gradient.args)
        elif own.target is product:
            self.gradients[node] = self.call(add_product, gradient, *own.args)
        else:
            self.gradients[node] = self.call(add, own, gradient)

    def frozen(self, weight: Any, *reads: Any) -> None:
        """The gradient of a backbone weight: there for the pruning to find that nobody wants it."""
        self.frozen_roots.append(self.call(weight_gradient, weight, *reads))

    def trainable(self, name: str, target: Callable[..., Any], *args: Any) -> None:
        """The sum of a trainable tensor's gradient: what everything in reverse is computed for."""
        self.trainable_roots.append(
            self.call(target, self.call(operator.getitem, self.accumulators, name), *args)
        )
