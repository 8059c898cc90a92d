"""From the layer's source to a graph of kernel operations, and from its bypass sites to one method's operations."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.fx import Graph, Node, Tracer

from services.gpu_worker.compiler.operations import TRACED
from services.gpu_worker.kernels import bypass as kernels
from services.gpu_worker.model import layer, layer_backward
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import ONE_RANK, Layout, State
from services.gpu_worker.model.parallel import shard_config
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    Projection,
    base_label,
    projections,
)
from services.gpu_worker.model.shards import rank_parameters

SITES = (
    layer.bypass,
    layer.bypass_low_rank,
    layer.bypass_change,
    layer.bypass_input,
    layer.virtual_rows,
)


def trace(config: ModelConfig) -> Graph:
    """The layer of a model configuration, with every bypass site in it; a graph of the caller's own."""
    return deepcopy(_traced(config))  # in a fraction of the time that tracing takes


@lru_cache(maxsize=16)
def _traced(config: ModelConfig) -> Graph:
    return Tracer(autowrap_functions=TRACED).trace(layer.make_layer(config))  # type: ignore[arg-type]


def site_name(node: Node) -> str:
    """A fused linear, `<group>_in` for its input, or prefix."""
    if node.target is layer.virtual_rows:
        return "prefix"
    return f"{node.args[-1]}_in" if node.target is layer.bypass_input else str(node.args[-1])


def remove_sites(graph: Graph, keep: Callable[[str], bool]) -> None:
    """Takes out the sites that `keep` does not want: what passed through them passes by."""
    for node in list(graph.nodes):
        if node.target not in SITES or keep(site_name(node)):
            continue
        if node.target is layer.virtual_rows:
            for user in list(node.users):
                user.replace_all_uses_with(node.args[user.args[1]])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(node.args[0])
            _inherit(node.args[0], node)
        graph.erase_node(node)


def _inherit(heir: Node, node: Node) -> None:
    if "label" in node.meta:
        heir.meta["label"] = node.meta["label"]


def insert_bypasses(
    graph: Graph, whole: ModelConfig, method: Method, dropout: bool, layout: Layout = ONE_RANK
) -> None:
    """Replaces the sites by the operations of one method, for whose parameters the graph gets a placeholder.

    `graph` is of one of the ranks that share the `whole` configuration, whose moves `layout` says.
    """
    remove_sites(graph, lambda name: name == "prefix" and isinstance(method, PrefixConfig))
    nodes = list(graph.nodes)
    after = next(node for node in nodes if node.op == "placeholder" and node.name == "ctx")
    with graph.inserting_after(after):
        bypasses = graph.placeholder("p")
    shapes = {p.key: p.shape for p in rank_parameters(whole, method, layout) if p.layer == 0}
    config = shard_config(whole, layout.tp)
    _Insertion(graph, config, whole, method, dropout, layout, shapes, bypasses, after, after).run()


@dataclass(slots=True)
class _Insertion:
    graph: Graph
    config: ModelConfig  # of a rank
    whole: ModelConfig
    method: Method
    dropout: bool
    layout: Layout
    shapes: dict[str, tuple[int, ...]]  # of a rank's parameters of a layer
    bypasses: Node
    ctx: Node
    last: Node  # behind which the next operation comes

    def run(self) -> None:
        linears = [node for node in self.graph.nodes if node.target is layer.project]
        for node in linears:
            group = str(node.args[1].args[1])
            members = [p for p in projections(self.config).values() if p.group == group]
            if isinstance(self.method, LoraConfig | Ia3Config | BottleneckConfig):
                members = [p for p in members if p.name in self.method.targets]
                if members:
                    self._attach(node, group, members)

    def _attach(self, node: Node, group: str, members: list[Projection]) -> None:
        method = self.method
        if isinstance(method, LoraConfig):
            node = self._low_rank(node, group, members)
        for member in members:
            if isinstance(method, LoraConfig) and method.dora:
                self._change(node, member, self._rescale)
            elif isinstance(method, Ia3Config) and member.name in method.feedforward:
                self._scale_input(node, member)
            elif isinstance(method, Ia3Config):
                self._change(node, member, self._scale)
            elif isinstance(method, BottleneckConfig):
                self._change(node, member, self._bottleneck)

    def _call(self, target: Callable[..., Any], *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def _fetch(self, target: Callable[..., Any], parameter: str, shape: tuple[int, ...], *args: Any) -> Node:
        node = self._call(target, self.bypasses, *args)
        node.meta.update(parameter=parameter, shape=shape)
        return node

    def _put(self, target: Callable[..., Any], *args: Any) -> Node:
        with self.graph.inserting_after(self.last):
            self.last = self._call(target, *args)
        return self.last

    def _moved(self, x: Any, site: str, index: int, width: int) -> Any:
        """`x`, of `width` features in all, after the move before, between or behind a site's two products."""
        composition = self.layout.find(site)
        if composition is None:
            return x
        there, back = composition.forward[index], composition.backward[-1 - index]
        if there.stays and back.stays:
            return x
        steps = ((move.source, move.target) for move in (there, back))
        node = self._put(layer_backward.move, x, self.ctx, *steps, width)
        node.meta["width"] = width / (self.layout.tp if there.target in (State.TOKENS, State.FEATURES) else 1)
        return node

    def _low_rank(self, node: Node, group: str, members: list[Projection]) -> Node:
        assert isinstance(self.method, LoraConfig)
        fused = [p for p in projections(self.whole).values() if p.group == group]
        inputs, out, rank = fused[0].in_features, fused[-1].rows.stop, len(members) * self.method.rank
        first = next(p for p in fused if p.name == members[0].name)
        width, rows = self.shapes[f"{first.name}.a"][1], self.shapes[f"{first.name}.b"][0]
        own_out = out * rows // first.out_features  # of all projections a rank has the same part
        self.last = node
        a = self._put_fetch(kernels.fetch, f"{group}.a", (rank, width), group, "a")
        b = self._put_fetch(kernels.fetch, f"{group}.b", (own_out, rank), group, "b")
        x = node.args[0]
        if self.dropout:
            x = self._put(layer_backward.dropout, x, self.ctx, group)
        low = self._put(kernels.lora_down, self._moved(x, group, 0, inputs), a)
        low.meta["label"] = f"{group}_low"
        low = self._moved(low, group, 1, rank)
        up = self._add_part(node, low, b, group, out)
        node.replace_all_uses_with(up, delete_user_cb=lambda user: user is not up)
        self._move_label(node, up)
        return up

    def _add_part(self, node: Node, low: Node, b: Node, group: str, out: int) -> Node:
        composition = self.layout.find(group)
        if composition is None or (composition.forward[2].stays and composition.backward[0].stays):
            return self._put(kernels.lora_up, node, low, b)
        return self._put(layer.add, node, self._moved(self._put(kernels.lora_part, low, b), group, 2, out))

    def _put_fetch(
        self, target: Callable[..., Any], parameter: str, shape: tuple[int, ...], *args: Any
    ) -> Node:
        node = self._put(target, self.bypasses, *args)
        node.meta.update(parameter=parameter, shape=shape)
        return node

    def _move_label(self, node: Node, heir: Node) -> None:
        if "label" in node.meta:
            heir.meta["label"] = node.meta.pop("label")

    def _projection_node(self, node: Node, member: Projection) -> Node:
        """The output of one projection of a fused linear: a part of the split that follows, or all of it."""
        split = next((user for user in node.users if user.target is layer.split), None)
        if split is None:
            return next((user for user in node.users if user.target is layer.all_reduce), node)
        index = [p.name for p in projections(self.config).values() if p.group == member.group].index(
            member.name
        )
        return next(user for user in split.users if user.args[1] == index)

    def _change(self, node: Node, member: Projection, make: Callable[[Node, Projection], Node]) -> None:
        """Puts what `make` builds from a projection's output in that output's place."""
        base = self._projection_node(node, member)
        users = list(base.users)
        changed = make(base, member)
        for user in users:
            user.replace_input_with(base, changed)
        self._move_label(base, changed)
        base.meta["label"] = base_label(member.name)

    def _scale(self, base: Node, member: Projection) -> Node:
        rows = member.rows
        with self.graph.inserting_after(base):
            factor = self._fetch(
                kernels.fetch_rows, f"{member.name}.scale", (member.out_features,),
                member.group, "scale", rows.start, rows.stop,
            )  # fmt: skip
        with self.graph.inserting_after(factor):
            return self._call(kernels.scale, base, factor)

    def _rescale(self, base: Node, member: Projection) -> Node:
        rows = member.rows
        has_bias = self.config.qkv_bias and member.group == "qkv"
        with self.graph.inserting_after(base):
            factor = self._fetch(
                kernels.fetch_rows, f"{member.name}.magnitude", (member.out_features,),
                member.group, "scale", rows.start, rows.stop,
            )  # fmt: skip
        bias, last = None, factor
        if has_bias:
            weight = next(n.args[1] for n in self.graph.nodes if n.target is layer.project)
            with self.graph.inserting_after(factor):
                bias = last = self._call(kernels.fetch_bias, weight, rows.start, rows.stop)
        with self.graph.inserting_after(last):
            return self._call(kernels.rescale, base, factor, bias)

    def _scale_input(self, node: Node, member: Projection) -> None:
        linear = node
        with self.graph.inserting_before(linear):
            factor = self._fetch(
                kernels.fetch,
                f"{member.name}.input_scale",
                (member.in_features,),
                member.group,
                "input_scale",
            )
            scaled = self._call(kernels.scale, linear.args[0], factor)
        linear.replace_input_with(linear.args[0], scaled)  # type: ignore[arg-type]

    def _bottleneck(self, base: Node, member: Projection) -> Node:
        method = self.method
        assert isinstance(method, BottleneckConfig)
        source = base
        if method.parallel:
            source = next(
                n.args[0] for n in self.graph.nodes
                if n.target is layer.project and n.args[1].args[1] == member.group
            )  # fmt: skip
        name, whole = member.name, projections(self.whole)[member.name]
        width = whole.in_features if method.parallel else whole.out_features
        self.last, fetched = base, {}
        for role in ("down_w", "down_b", "up_w", "up_b"):
            shape, args = self.shapes[f"{name}.{role}"], (member.group, name, role)
            fetched[role] = self._put_fetch(kernels.fetch_bottleneck, f"{name}.{role}", shape, *args)
        read = self._moved(source, name, 0, width)
        down = self._put(layer_backward.affine, read, fetched["down_w"], fetched["down_b"])
        low = self._moved(down, name, 1, method.size)
        hidden = self._put(kernels.activate, low, method.activation)
        up = self._put(layer_backward.affine, hidden, fetched["up_w"], fetched["up_b"])
        return self._put(layer.add, base, self._moved(up, name, 2, whole.out_features))
