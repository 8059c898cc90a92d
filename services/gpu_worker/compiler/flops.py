"""FLOPs of a token in one layer, from its graphs: what a recomputation is measured against.

Of the forward every operation is counted, of the backward the products; what is elementwise there comes to less
than a thousandth. A multiply-add is two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.fx import Node

from services.gpu_worker.compiler.operations import width
from services.gpu_worker.compiler.reverse import JointGraph
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.model import layer_backward
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import HEAD, Method


def forward_flops(joint: JointGraph) -> float:
    return float(sum(node.meta.get("flops", 0.0) for node in joint.forward))


def backward_flops(joint: JointGraph, sizes: Sizes, method: Method) -> float:
    """Of what is left of the reverse, without recomputation; a parameter's gradient costs one multiply-add an
    element."""
    found = 2.0 * num_layer_parameters(sizes.config, method)
    for node in joint.backward:
        price = _PRODUCTS.get(node.target)  # type: ignore[arg-type]
        found += price(node, sizes) if price is not None else 0.0
    return found


def num_layer_parameters(config: ModelConfig, method: Method) -> int:
    """Trainable ones of one layer; all layers have as many."""
    return sum(parameter.numel for parameter in parameters(config, method) if parameter.layer == 0)


def head_flops(config: ModelConfig, method: Method) -> float:
    """Of the vocabulary, forward and backward, for a token that has a label; a low-rank part is trained too."""
    low_rank = sum(p.numel for p in parameters(config, method) if p.module == HEAD)
    return 4.0 * config.hidden_size * config.vocab_size + 6.0 * low_rank


def _project_backward(node: Node, sizes: Sizes) -> float:
    weight = node.args[1]
    return 2 * sizes.in_features(weight) * sizes.out_features(weight)


def _attend_backward(node: Node, sizes: Sizes) -> float:
    """Five products: scores again, dV, dP, dQ and dK."""
    return 10 * sizes.mean_context * width(node.args[1])


def _low_rank(node: Node, sizes: Sizes) -> float:
    weight = node.args[-1]
    assert isinstance(weight, Node)
    return float(2 * math.prod(weight.meta["shape"]))


_PRODUCTS: dict[Callable[..., object], Callable[[Node, Sizes], float]] = {
    layer_backward.project_backward: _project_backward,
    layer_backward.attend_backward: _attend_backward,
    layer_backward.product: _low_rank,
    layer_backward.add_product: _low_rank,
}
