"""Our own code run on tensors that hold nothing, to learn what it allocates before there is a model or a machine.

Layers are alike, so one stands for all, and sizes grow with their number by the difference of two and one.
float16 stands in for bfloat16: it has its size, and no second layout of oneDNN's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.optimizer import TrainableParameters
from services.gpu_worker.finetune.sequence_tensors import MAX_CACHED_WINDOWS
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.quantised import GROUP_SIZE, Int4Linear, Int8Linear, Scheme, quantise
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parallel import Group, shard_config
from services.gpu_worker.model.peft import Method, projections
from services.gpu_worker.model.weights import MakeLinear, ModelWeights, build_weights

CPU = torch.device("cpu")
BLOCK_SIZE = 16
Form = Literal["none", Scheme]
FORMS: dict[Form, MakeLinear] = {
    "none": DenseLinear,
    "int8": Int8Linear.quantise,
    "int4": partial(Int4Linear.quantise, group_size=GROUP_SIZE),
}


@dataclass(frozen=True, slots=True)
class SequenceBytes:
    """What a training sequence holds beside its activations and its keys and values."""

    residual_gradient_bytes: int
    kv_gradient_bytes: int  # of one layer at a time, float32
    mask_bytes: int  # of the windows that it is cut into; Triton's kernels need none

    @property
    def total(self) -> int:
        return self.residual_gradient_bytes + self.kv_gradient_bytes + self.mask_bytes


def weight_bytes(config: ModelConfig, dtype: torch.dtype, form: Form) -> int:
    """Of the whole model on one device; `form` of the layers' linears is a key of FORMS.

    Raises UnsupportedModel where the form cannot hold a weight.
    """
    return _of_all_layers(config, lambda c: fake_weights(c, dtype, form).size_bytes)


def second_layout_bytes(config: ModelConfig, dtype: torch.dtype, form: Form) -> int:
    """What oneDNN keeps of dense linears beside them, on a CPU that multiplies in bfloat16."""
    if dtype != torch.bfloat16:
        return 0
    layer = sum(math.prod((p.out_features, p.in_features)) for p in projections(config).values())
    dense = config.num_layers * layer if form == "none" else 0
    return (dense + config.vocab_size * config.hidden_size) * dtype.itemsize


def trainable_bytes(
    whole: ModelConfig,
    method: Method,
    dtype: torch.dtype,
    of: Callable[[TrainableParameters], int],
    layout: Layout = ONE_RANK,
) -> int:
    """What `of` says of the parameters in training, of one of the layout's ranks."""

    def measure(config: ModelConfig) -> int:
        weights = rank_weights(config, dtype, "none", layout.tp)
        return of(TrainableParameters(weights, method, JobConfig(), layout))

    return _of_all_layers(whole, measure)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    with FakeTensorMode():
        heads = config.num_kv_heads, config.head_dim
        return KVCache(config.num_layers, 1, 1, *heads, dtype, CPU).size_bytes


def _of_all_layers(config: ModelConfig, measure: Callable[[ModelConfig], int]) -> int:
    with FakeTensorMode():
        one, two = (measure(replace(config, num_layers=number)) for number in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def fake_weights(config: ModelConfig, dtype: torch.dtype, form: Form = "none") -> ModelWeights:
    """Within a FakeTensorMode."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{p.path}.weight": (p.out_features, p.in_features) for p in projections(config).values()
    }
    shapes |= {f"{p.path}.bias": (p.out_features,) for p in projections(config).values()}
    shapes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (config.head_dim,))
    vocabulary = config.vocab_size, config.hidden_size
    outside = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}

    def fetch(name: str) -> Tensor:
        own = name.removeprefix("model.layers.").partition(".")[2]
        shape = outside.get(name) or shapes.get(own, (config.hidden_size,))
        return torch.empty(shape, dtype=stand_in(dtype))

    return build_weights(config, fetch, FORMS[form])


class SilentGroup(Group):
    """A rank of a group that does not exist: what the others would send has the right shape and no values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        return x

    def all_reduce_(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int, total: int) -> Tensor:
        return x.new_empty([total if i == dim else size for i, size in enumerate(x.shape)])

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.part(x, dim).clone()

    def all_to_all(self, x: Tensor, split_dim: int, join_dim: int, total: int) -> Tensor:
        return self.all_gather(self.part(x, split_dim), join_dim, total)


def rank_weights(whole: ModelConfig, dtype: torch.dtype, form: Form, tp: int) -> ModelWeights:
    """Of one of `tp` ranks; within a FakeTensorMode."""
    own = fake_weights(shard_config(whole, tp), dtype, form)
    return replace(own, whole=whole, group=SilentGroup(tp)) if tp > 1 else own


def prepare_forms() -> None:
    """To be called outside of a FakeTensorMode: what int4 asks of the processor is asked once and remembered."""
    quantise(torch.zeros(2, GROUP_SIZE), scheme="int4")


def stand_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else dtype


def sequence_bytes(
    config: ModelConfig, dtype: torch.dtype, num_tokens: int, window: int, kernels: Kernels = TORCH
) -> SequenceBytes:
    wide, dtype = accumulation_dtype(dtype), stand_in(dtype)
    group = config.num_heads // config.num_kv_heads
    ends = [] if kernels.is_triton else range(num_tokens, 0, -window)[:MAX_CACHED_WINDOWS]
    with FakeTensorMode(), LiveBytes() as live:
        held = [torch.empty(num_tokens, config.hidden_size, dtype=dtype)]
        residual = live.now
        held += [torch.empty(config.num_kv_heads, num_tokens, config.head_dim, dtype=wide) for _ in range(2)]
        gradients = live.now - residual
        held += [causal_mask(min(window, end), end, group, dtype, CPU) for end in ends]
        return SequenceBytes(residual, gradients, live.now - residual - gradients)
