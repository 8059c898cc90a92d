"""One decoder layer of the Llama family, written once, over plain operations.

Nobody runs this function: the compiler traces it to a graph and makes programs of it, for serving, for
keeping activations and, in reverse, for finetuning. Every operation that it calls is named in
`compiler/operations.py` with what its gradient reads. `label` names a tensor for people and for what is kept.

x -> input_norm -> qkv -> (norm of heads) -> rope -> attention -> o -> + x
  -> post_norm -> gate, up -> silu(gate) * up -> down -> +
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy

from services.gpu_worker.kernels.backend import RmsNorm, RopeCacheWrite, Rotation
from services.gpu_worker.kernels.kv_cache import rope_cache_write
from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.norm_rope import rms_norm, rope, silu_mul
from services.gpu_worker.model.config import ModelConfig

if TYPE_CHECKING:
    from services.gpu_worker.model.context import LayerContext


def project(x: Tensor, weight: FrozenLinear) -> Tensor:
    return weight.forward(x)


def project_rows(x: Tensor, weight: FrozenLinear, rows: int) -> Tensor:
    """The first features of `project`."""
    return weight.forward_rows(x, rows)


def split(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views of neighbouring features."""
    return tuple(x.split(sizes, -1))


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def add_(x: Tensor, y: Tensor) -> Tensor:
    """`add` in the place of `y`."""
    return y.add_(x)


def head_norm_by(norm: RmsNorm) -> RmsNorm:
    def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm` of each head: [N, heads * E] with `weight` [E]."""
        return norm(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(1)

    return head_norm


def rotate_by(rotation: Rotation) -> Callable[[Tensor, LayerContext], Tensor]:
    def rotate(x: Tensor, ctx: LayerContext) -> Tensor:
        """Rotary embedding of [N, heads * E]."""
        cos, sin = ctx.rotation
        return rotation(x.unflatten(-1, (-1, cos.shape[-1])), cos, sin).flatten(1)

    return rotate


head_norm, rotate = head_norm_by(rms_norm), rotate_by(rope)


def virtual_rows(k: Tensor, v: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
    """Learned keys and values in the rows of prefix tuning's virtual tokens."""
    return ctx.virtual_rows(k, v)


def cache_write(k: Tensor, v: Tensor, ctx: LayerContext) -> Any:
    """Keys and values [N, G * E] of the rows into the cache. The result stands for them in the graph: it says
    that `attend` comes later, which finds them in the cache."""
    ctx.cache_write(k, v)
    return None


def rotate_cache_write_by(kernel: RopeCacheWrite) -> Callable[[Tensor, Tensor, Tensor, LayerContext], Tensor]:
    def rotate_cache_write(q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """`rotate` of queries and keys and `cache_write` in one. Returns the queries."""
        heads = (-1, ctx.cache.head_dim)
        places = ctx.batch.slots, ctx.cache.keys[ctx.index], ctx.cache.values[ctx.index]
        stream = (x.unflatten(-1, heads) for x in (q, k, v))
        return kernel(*stream, *ctx.rotation, *places).flatten(1)

    return rotate_cache_write


rotate_cache_write = rotate_cache_write_by(rope_cache_write)


def attend(q: Tensor, cached: None, ctx: LayerContext) -> tuple[Tensor, Tensor]:
    """Causal attention of every row to its sequence: [N, H * E], and the log-sum-exp [N, H]."""
    return ctx.attend(q, cached)


def bypass(y: Tensor, x: Tensor, ctx: LayerContext, group: str) -> Tensor:
    """What the rows' adapters add to a fused linear's output `y` of its input `x`, in place."""
    return ctx.bypass(y, x, group)


def bypass_low_rank(y: Tensor, x: Tensor, ctx: LayerContext, group: str) -> Tensor:
    """The part of `bypass` that is a sum over the features of `x`, so that it may be shared like them."""
    return ctx.bypass_low_rank(y, x, group)


def bypass_change(y: Tensor, x: Tensor, ctx: LayerContext, group: str) -> Tensor:
    """The part of `bypass` that needs the finished output."""
    return ctx.bypass_change(y, x, group)


def bypass_input(x: Tensor, ctx: LayerContext, group: str) -> Tensor:
    """What the rows' adapters do to a fused linear's input, in place."""
    return ctx.bypass_input(x, group)


def fan_out(x: Tensor, ctx: LayerContext) -> Tensor:
    """`x`, which every rank has, into what the ranks share: its gradient is the sum of theirs."""
    return x


def all_reduce(x: Tensor, ctx: LayerContext) -> Tensor:
    """The sum over the ranks; its gradient is every rank's."""
    return ctx.all_reduce_(x.clone(memory_format=torch.contiguous_format))


def all_reduce_(x: Tensor, ctx: LayerContext) -> Tensor:
    return ctx.all_reduce_(x)


def keep(x: Tensor, ctx: LayerContext, name: str) -> None:
    """Hands `x` to whoever keeps activations of its rows."""
    ctx.keep(x, name)


def label(name: str, x: Any) -> Any:
    """Names a traced tensor."""
    if isinstance(x, Proxy):
        x.node.meta["label"] = name
    return x


def make_layer(config: ModelConfig) -> Callable[[Any, Any, Any], Any]:
    """The layer's function of (x [N, D], its weights, its context) -> [N, D]."""
    eps = config.rms_norm_eps

    def layer(x: Any, w: Any, ctx: Any) -> Any:
        label("x", x)
        h = label("h", rms_norm(x, w.input_norm, eps))
        qkv = bypass(project(h, w.qkv), h, ctx, "qkv")
        q, k, v = split(qkv, (config.q_size, config.kv_size, config.kv_size))
        q, k, v = label("q", q), label("k", k), label("v", v)
        if config.qk_norm:
            q = label("q_normed", head_norm(q, w.q_norm, eps))
            k = label("k_normed", head_norm(k, w.k_norm, eps))
        q, k = label("q_rotated", rotate(q, ctx)), label("k_rotated", rotate(k, ctx))
        k, v = virtual_rows(k, v, ctx)
        cached = label("cached", cache_write(k, v, ctx))
        o, lse = attend(q, cached, ctx)
        o, lse = label("o", o), label("lse", lse)
        scaled_o = bypass_input(o, ctx, "o")
        a = label("a", bypass(project(scaled_o, w.o), scaled_o, ctx, "o"))
        x2 = label("x2", add(x, a))

        h2 = label("h2", rms_norm(x2, w.post_norm, eps))
        gate_up = bypass(project(h2, w.gate_up), h2, ctx, "gate_up")
        gate, up = split(gate_up, (config.intermediate_size, config.intermediate_size))
        m = label("m", silu_mul(label("gate", gate), label("up", up)))
        scaled_m = bypass_input(m, ctx, "down")
        d = label("d", bypass(project(scaled_m, w.down), scaled_m, ctx, "down"))
        return label("y", add(x2, d))

    return layer
