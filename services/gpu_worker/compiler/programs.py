"""The compiled forms of a model's layer: forward programs by what a batch needs, and one method's backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import torch
from torch.fx import Graph, Node

from services.gpu_worker.compiler.emit import Program, compile_graph, emit_backward
from services.gpu_worker.compiler.flops import backward_flops
from services.gpu_worker.compiler.fuse import fuse_backward, fuse_forward
from services.gpu_worker.compiler.rematerialize import ALWAYS_KEPT, Policy, loads, policies
from services.gpu_worker.compiler.reverse import JointGraph, differentiate
from services.gpu_worker.compiler.shard import trace_rank
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.compiler.trace import insert_bypasses, remove_sites
from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model import layer
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import LayerProgram
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parallel import shard_config
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import EMBEDDING, Method, base_label

WIDE = ("lse",)  # labels of tensors that are float32 whatever the model's dtype


class ForwardPrograms:
    """The layer's forward for every combination of bypass sites in use and tensors to keep, made when first
    needed. A batch of the base model's tokens alone runs a program with neither."""

    def __init__(self, config: ModelConfig, tp: int = 1, kernels: Kernels = TORCH) -> None:
        self.config, self.tp, self._kernels = config, tp, kernels
        self._programs: dict[tuple[frozenset[str], frozenset[str]], LayerProgram] = {}
        self._lock = Lock()  # forwards of two threads ask at once

    def get(self, sites: frozenset[str], kept: frozenset[str]) -> LayerProgram:
        """`kept` are labels of `model/layer.py`; others (of bypasses' own tensors) are kept by the sites."""
        key = sites, kept
        with self._lock:
            if key not in self._programs:
                graph = self.graph(sites, kept)
                if self._kernels.is_triton:
                    fuse_forward(graph)
                self._programs[key] = compile_graph(graph, self._kernels)
            return self._programs[key]

    def graph(self, sites: frozenset[str], kept: frozenset[str]) -> Graph:
        graph = trace_rank(self.config, self.tp)
        remove_sites(graph, lambda name: name in sites)
        ctx = next(node for node in graph.nodes if node.name == "ctx")
        for node in list(graph.nodes):
            if node.meta.get("label") in kept:
                with graph.inserting_after(ctx if node.op == "placeholder" else node):
                    graph.call_function(layer.keep, (node, ctx, node.meta["label"]))
        return graph


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A forward tensor that can be kept: elements a token, and whether they are float32 in any model."""

    label: str
    width: int
    wide: bool

    def itemsize(self, dtype: torch.dtype) -> int:
        return accumulation_dtype(dtype).itemsize if self.wide else dtype.itemsize


class CompiledMethod:
    """A PEFT method on a model: its policies, and for each the layer's backward program.

    Of ranks that share the model as `layout` says, sizes are those of one; raises UnsupportedModel where they
    cannot. The order of policies depends on the mean context, hence on `sequence_length`.
    """

    def __init__(
        self,
        config: ModelConfig,
        method: Method,
        *,
        dtype: torch.dtype,
        sequence_length: int,
        dropout: bool = False,
        layout: Layout = ONE_RANK,
        kernels: Kernels = TORCH,
    ) -> None:
        self.config, self.method, self.dtype = shard_config(config, layout.tp), method, dtype
        self.whole, self.layout = config, layout
        self._dropout, self.kernels = dropout, kernels
        self._sizes = Sizes.of(self.config, sequence_length)
        self._keepable = self._keepable_labels()
        self._programs: dict[tuple[Policy, bool], Program] = {}
        self._bottom_joint: JointGraph | None = None

    def _keepable_labels(self) -> frozenset[str]:
        traced = {
            node.meta["label"]
            for node in trace_rank(self.whole, self.layout.tp).nodes
            if "label" in node.meta
        }
        own = {base_label(p.module) for p in parameters(self.config, self.method) if p.layer is not None}
        return frozenset(traced | own) - set(ALWAYS_KEPT) - {"y"}

    # --- graphs

    def joint_graph(self, needs_input_gradient: bool = True) -> JointGraph:
        """Forward and pruned backward of one layer; a new graph at each call."""
        graph = trace_rank(self.whole, self.layout.tp)
        insert_bypasses(graph, self.whole, self.method, self._dropout, self.layout)
        return differentiate(graph, self._sizes, needs_input_gradient)

    @cached_property
    def joint(self) -> JointGraph:
        return self.joint_graph()

    @property
    def trains_layers(self) -> bool:
        """Whether the backward has to enter the layers at all: a head's LoRA alone does not need them."""
        return bool(self.joint.backward) and (self._has_layer_parameters or self.needs_embedding_gradient)

    @property
    def _has_layer_parameters(self) -> bool:
        keys = {(p.layer is not None, p.key) for p in parameters(self.config, self.method)}
        return any(in_layer or key == "prefix.rows" for in_layer, key in keys)

    @property
    def needs_embedding_gradient(self) -> bool:
        """Whether something below the first layer is trained."""
        keys = {p.key for p in parameters(self.config, self.method)}
        return bool(keys & {"prompt.rows", f"{EMBEDDING}.a"})

    @cached_property
    def backward_flops(self) -> float:
        """Of a token in one layer, without what is computed again."""
        return backward_flops(self.joint, self._sizes, self.method)

    # --- policies

    @cached_property
    def tensors(self) -> dict[str, KeptTensor]:
        """By label: the layer's input and all that could be kept."""
        found = {}
        for node in self.joint.forward:
            name = node.meta.get("label")
            if name in self._keepable or name == "x":
                found[name] = KeptTensor(name, int(node.meta["widths"][0]), name in WIDE)
        return found

    @cached_property
    def policies(self) -> list[Policy]:
        """Ordered: the first keeps most and computes least again."""
        return policies(self.joint, self._keepable, self.bytes_of(self.joint))

    def bytes_of(self, joint: JointGraph) -> dict[Node, float]:
        """Bytes a token of every forward tensor."""
        wide = accumulation_dtype(self.dtype).itemsize
        return {
            node: sum(node.meta["widths"]) * (wide if node.meta.get("label") in WIDE else self.dtype.itemsize)
            for node in joint.forward
            if "widths" in node.meta
        }

    def kept(self, policy: Policy, bottom: bool) -> frozenset[str]:
        """Labels that a layer's backward loads; the bottom one stops where nothing below is trained."""
        joint = self._joint_of(bottom)
        return frozenset(node.meta["label"] for node in loads(joint, self._nodes(joint, policy))) - {"cached"}

    def backward(self, policy: Policy, bottom: bool) -> Program:
        """(dy, w, ctx, p, g, kept) -> the gradient of the layer's input, or None at the bottom."""
        key = policy, bottom
        if key not in self._programs:
            joint = self._joint_of(bottom)
            graph = emit_backward(joint, self._nodes(joint, policy))
            if self.kernels.is_triton:
                fuse_backward(graph)
            self._programs[key] = compile_graph(graph, self.kernels)
        return self._programs[key]

    def _joint_of(self, bottom: bool) -> JointGraph:
        if not bottom or self.needs_embedding_gradient:
            return self.joint
        if self._bottom_joint is None:
            self._bottom_joint = self.joint_graph(needs_input_gradient=False)
        return self._bottom_joint

    def _nodes(self, joint: JointGraph, policy: Policy) -> set[Node]:
        return {node for node in joint.forward if node.meta.get("label") in policy.kept}
