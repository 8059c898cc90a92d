"""Puts an engine's choice of kernels in the place of torch's, once and for all, while a program is compiled.

A graph is traced, differentiated and planned with torch's functions as its operations, whoever computes in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph

from services.gpu_worker.kernels import bypass, norm_rope
from services.gpu_worker.kernels.backend import Kernels
from services.gpu_worker.model import layer, layer_backward


def bind(graph: Graph, kernels: Kernels) -> None:
    """Makes the graph's calls those of `kernels`."""
    if not kernels.is_triton:
        return
    forms = _forms(kernels)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = forms.get(node.target, node.target)


def _forms(kernels: Kernels) -> dict[Callable[..., Any], Callable[..., Any]]:
    return {
        norm_rope.rms_norm: kernels.rms_norm,
        norm_rope.add_rms_norm: kernels.add_rms_norm,
        norm_rope.rms_norm_backward: kernels.rms_norm_backward,
        norm_rope.silu_mul: kernels.silu_mul,
        norm_rope.silu_mul_backward: kernels.silu_mul_backward,
        bypass.accumulate_low_rank: kernels.accumulate_low_rank,
        bypass.low_rank_backward_: kernels.low_rank_backward_,
        layer.head_norm: layer.head_norm_by(kernels.rms_norm),
        layer.rotate: layer.rotate_by(kernels.rope),
        layer.rotate_cache_write: layer.rotate_cache_write_by(kernels.rope_cache_write),
        layer_backward.head_norm_backward: layer_backward.head_norm_backward_by(kernels.rms_norm_backward),
        layer_backward.rotate_backward: layer_backward.rotate_backward_by(kernels.rope_backward),
    }
