"""What of the reserved set is kept and what is computed again: an ordered list of policies, dearest first.

A tensor leaves the kept set when its recomputation costs the fewest FLOPs a byte freed; what it is computed
from has to be kept or computed too, and what is computed anyway costs nothing more. The last policy keeps the
layer's input alone, beside keys and values, which lie in the cache in any case.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from services.gpu_worker.compiler.operations import FORWARD
from services.gpu_worker.compiler.reverse import JointGraph
from services.gpu_worker.model import layer

EQUAL_PRICE = 1.1  # prices that differ by less are alike: then what frees more goes first
ALWAYS_KEPT = ("x", "cached")


@dataclass(frozen=True, slots=True)
class Policy:
    """`kept` are labels beside the layer's input and the cache; bytes and FLOPs are of one token and layer."""

    kept: frozenset[str]
    bytes_per_token: float  # of all that is kept, the layer's input included, the cache not
    flops_per_token: float  # of what is computed again

    @property
    def name(self) -> str:
        return "+".join(["x", *sorted(self.kept)])


def policies(joint: JointGraph, keepable: frozenset[str], bytes_of: Mapping[Node, float]) -> list[Policy]:
    """From everything that is read and can be kept, down to the layer's input.

    `keepable` are labels that the forward can hand out, `bytes_of` the bytes a token of each tensor.
    """
    kept = {node for node in joint.reads() if node.meta.get("label") in keepable}
    found = [_policy(joint, kept, bytes_of)]
    while kept:
        victim = _cheapest(joint, kept, bytes_of)
        kept = kept - {victim}
        policy = _policy(joint, kept, bytes_of)
        if policy.flops_per_token == found[-1].flops_per_token:
            found.pop()  # the bytes were kept for nothing
        found.append(policy)
    return found


def policy_keeping(joint: JointGraph, labels: frozenset[str], bytes_of: Mapping[Node, float]) -> Policy:
    """The policy that keeps what the backward reads of these labels."""
    return _policy(joint, {node for node in joint.forward if node.meta.get("label") in labels}, bytes_of)


def kept_nodes(joint: JointGraph, policy: Policy) -> set[Node]:
    """The tensors that a policy keeps, in a graph of the method that it was made for."""
    return {node for node in joint.forward if node.meta.get("label") in policy.kept}


def _policy(joint: JointGraph, kept: set[Node], bytes_of: Mapping[Node, float]) -> Policy:
    x = next(node for node in joint.forward if node.meta.get("label") == "x")
    loaded = loads(joint, kept)
    size = sum(bytes_of[node] for node in loaded | {x} if node.meta["label"] != "cached")
    labels = frozenset(node.meta["label"] for node in loaded) - set(ALWAYS_KEPT)
    return Policy(labels, size, recompute_flops(recomputed(joint, kept)))


def _cheapest(joint: JointGraph, kept: set[Node], bytes_of: Mapping[Node, float]) -> Node:
    """The kept tensor whose recomputation costs least a byte; of several alike the one that frees most."""
    now = recompute_flops(recomputed(joint, kept))
    prices = {
        node: (recompute_flops(recomputed(joint, kept - {node})) - now) / bytes_of[node] for node in kept
    }
    least = min(prices.values())
    alike = [node for node in kept if prices[node] <= max(least * EQUAL_PRICE, 0.0)]
    return min(alike, key=lambda node: (-bytes_of[node], prices[node], node.name))


def recomputed(joint: JointGraph, kept: Iterable[Node]) -> list[Node]:
    """Forward operations that the backward runs again, in order, when `kept` can be loaded."""
    needed = _needed(joint, set(kept))
    return [node for node in joint.forward if node in needed and not _is_loaded(node, kept)]


def loads(joint: JointGraph, kept: Iterable[Node]) -> set[Node]:
    """What of `kept` (and of what is always kept) the backward reads, directly or to recompute."""
    return {node for node in _needed(joint, set(kept)) if _is_loaded(node, kept)}


def _needed(joint: JointGraph, kept: set[Node]) -> set[Node]:
    waiting, needed = list(joint.reads()), set()
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        if not _is_loaded(node, kept):
            waiting += [source for source in node.all_input_nodes if "widths" in source.meta]
    return needed


def _is_loaded(node: Node, kept: Iterable[Node]) -> bool:
    return node in kept or node.meta.get("label") in ALWAYS_KEPT


def recompute_flops(nodes: list[Node]) -> float:
    """FLOPs a token; a fused linear of which only the first features are read computes no more."""
    rows = narrowed(nodes)
    total = 0.0
    for node in nodes:
        share = rows[node] / node.meta["widths"][0] if node in rows else 1.0
        total += node.meta["flops"] * share
    return total


def narrowed(nodes: list[Node]) -> dict[Node, int]:
    """Operations that need only the first features of a linear's output, and how many."""
    found: dict[Node, int] = {}
    wanted = set(nodes)
    for node in nodes:
        if node.target is not layer.split:
            continue
        used = [user.args[1] for user in node.users if user.target is operator.getitem and user in wanted]
        rows = int(sum(node.meta["widths"][: max(used) + 1]))  # type: ignore[type-var,operator]
        chain = _row_wise(node, wanted)
        if rows < sum(node.meta["widths"]) and chain:
            found |= dict.fromkeys(chain, rows)
    return found


def _row_wise(split: Node, wanted: set[Node]) -> list[Node]:
    """The operations in front of a split that can compute its first features alone, up to the linear."""
    chain: list[Node] = []
    node = split.args[0]
    while isinstance(node, Node) and node in wanted and FORWARD[node.target].first_rows is not None:  # type: ignore[index]
        chain.append(node)
        if node.target is layer.project:
            return chain
        node = node.args[0]
    return []
