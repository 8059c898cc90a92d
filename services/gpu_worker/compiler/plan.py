"""What the compiler decided for a layer, tensor by tensor, read off its graphs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch.fx import Node

from services.gpu_worker.compiler.operations import width
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.compiler.rematerialize import Policy, kept_nodes, recomputed
from services.gpu_worker.compiler.reverse import JointGraph
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.kernels import bypass as kernels
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model import layer, layer_backward


class TensorState(StrEnum):
    KEPT = "kept"
    IN_CACHE = "in cache"
    RECOMPUTED = "recomputed"
    PRUNED = "pruned"  # no backward operation reads it
    COMPRESSED = "compressed"  # something smaller is kept, or nothing, in its place


@dataclass(frozen=True, slots=True)
class TensorPlan:
    name: str
    made_by: str
    state: TensorState
    bytes_per_token: float
    kept_in_layers: int = 0
    in_its_place: str = ""


def tensor_plans(compiled: CompiledMethod, sizes: Sizes, chosen: Sequence[Policy]) -> list[TensorPlan]:
    """Every tensor of a layer's forward, in order, where `chosen` is the policy of each layer."""
    joint = compiled.joint
    size_bytes = compiled.bytes_of(joint)
    trains = compiled.trains_layers
    kept = [compiled.kept(p, index == 0) if trains else frozenset() for index, p in enumerate(chosen)]
    again = {node for p in set(chosen) for node in recomputed(joint, kept_nodes(joint, p))}
    found = []
    for node in joint.forward:
        if _is_tensor(node):
            label = node.meta.get("label")
            layers = sum(label in labels for labels in kept)
            state = _state(node, bool(layers), trains and node in again)
            found.append(TensorPlan(tensor_name(node), _operation(node), state, size_bytes[node], layers))
        found += _compressed(compiled, sizes, node)
    return [*found, _logits(compiled)]


def num_backward_operations(joint: JointGraph) -> int:
    """What is left of the reverse; to be compared with `joint.num_differentiated`."""
    return sum(node.target is not operator.getitem for node in joint.backward)


def weight_group(node: Node) -> str:
    """The fused linear of a `project`."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return str(weight.args[1])


def tensor_name(node: Node) -> str:
    """A tensor's label; others, which only bypasses make, are named after the linear that they sit on."""
    if "label" in node.meta:
        return str(node.meta["label"])
    if node.target is layer.project:
        return f"{weight_group(node)}_base"
    if node.target is layer_backward.dropout:
        return f"{node.args[2]}_dropout"
    if node.target is kernels.activate:
        return f"{tensor_name(node.all_input_nodes[0])}_active"
    if node.target is operator.getitem and node.all_input_nodes[0].target is layer.virtual_rows:
        return ("k_with_prefix", "v_with_prefix")[node.args[1]]  # type: ignore[index]
    own = next((arg.meta["parameter"] for arg in node.all_input_nodes if "parameter" in arg.meta), None)
    return node.name if own is None else own.removesuffix("_w").removesuffix("_scale").replace(".", "_")


def _is_tensor(node: Node) -> bool:
    """Whether the node stands for memory of its own: operations with several outputs are listed by these, a
    fused linear by its parts, and keys and values by what is written to the cache."""
    if len(node.meta.get("widths", ())) != 1 or node.target is layer.cache_write:
        return False
    return not (node.users and all(user.target is layer.split for user in node.users))


def _operation(node: Node) -> str:
    if node.op == "placeholder":
        return "the layer below"
    target = node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]
    return str(getattr(target, "__name__", target))


def _state(node: Node, is_kept: bool, is_recomputed: bool) -> TensorState:
    if any(user.target is layer.cache_write for user in node.users):
        return TensorState.IN_CACHE
    if is_kept:
        return TensorState.KEPT
    return TensorState.RECOMPUTED if is_recomputed else TensorState.PRUNED


def _compressed(compiled: CompiledMethod, sizes: Sizes, node: Node) -> list[TensorPlan]:
    """What an operation computes inside and autograd without fused kernels would keep."""
    itemsize = compiled.dtype.itemsize
    if node.target is layer.attend:
        size = sizes.num_heads * sizes.mean_context * itemsize
        return [
            TensorPlan(
                "probabilities", "attend", TensorState.COMPRESSED, size, in_its_place="lse, their log-sum-exp"
            )
        ]
    if node.target is layer_backward.dropout:
        size = width(node) * itemsize
        name = f"{node.args[2]}_mask"
        return [
            TensorPlan(name, "dropout", TensorState.COMPRESSED, size, in_its_place="a seed and the position")
        ]
    return []


def _logits(compiled: CompiledMethod) -> TensorPlan:
    """Of the head, once and not in every layer."""
    size = compiled.config.vocab_size * accumulation_dtype(compiled.dtype).itemsize
    place = "the log-sum-exp and the label"
    return TensorPlan("logits", "head", TensorState.COMPRESSED, size, in_its_place=place)
