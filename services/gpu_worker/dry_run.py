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
from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.finetune.activations import ActivationStore, Reserve
from services.gpu_worker.finetune.backward import BackwardContext, GradientState
from services.gpu_worker.finetune.host_ring import CopiesInTurn
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.optimizer import TrainableParameters
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.sequence_tensors import MAX_CACHED_WINDOWS
from services.gpu_worker.finetune.window_attention import GatheredWindow
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.cross_entropy import LowRankHead, linear_cross_entropy
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.quantised import GROUP_SIZE, Int4Linear, Int8Linear, Scheme, quantise
from services.gpu_worker.model.attention import GatheredAttention, PagedWindow, WindowPart
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import (
    AdapterRun,
    Capture,
    ForwardContext,
    LayerContext,
)
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parallel import Group, shard_config
from services.gpu_worker.model.peft import HEAD, LoraConfig, Method, projections
from services.gpu_worker.model.transformer import Transformer
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
class WindowBytes:
    """The most that is alive at once while a window is computed, beyond what was there before and what is kept."""

    forward_bytes: int  # one layer
    backward_bytes: int  # one layer, the gathered keys and values included
    loss_bytes: int

    @property
    def peak(self) -> int:
        return max(self.forward_bytes, self.backward_bytes, self.loss_bytes)


@dataclass(frozen=True, slots=True)
class SequenceBytes:
    """What a training sequence holds beside its activations and its keys and values."""

    residual_gradient_bytes: int
    kv_gradient_bytes: int  # of one layer at a time, float32
    mask_bytes: int  # of the windows that it is cut into

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
        return torch.empty(shape, dtype=_stand_in(dtype))

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


def _stand_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else dtype


def sequence_bytes(config: ModelConfig, dtype: torch.dtype, num_tokens: int, window: int) -> SequenceBytes:
    wide, dtype = accumulation_dtype(dtype), _stand_in(dtype)
    group = config.num_heads // config.num_kv_heads
    ends = range(num_tokens, 0, -window)[:MAX_CACHED_WINDOWS]
    with FakeTensorMode(), LiveBytes() as live:
        held = [torch.empty(num_tokens, config.hidden_size, dtype=dtype)]
        residual = live.now
        held += [torch.empty(config.num_kv_heads, num_tokens, config.head_dim, dtype=wide) for _ in range(2)]
        gradients = live.now - residual
        held += [causal_mask(min(window, end), end, group, dtype, CPU) for end in ends]
        return SequenceBytes(residual, gradients, live.now - residual - gradients)


def window_bytes(
    policies: LayerPolicies,
    form: Form,
    num_tokens: int,
    window: int,
    dropout: float = 0.0,
    loss: int | None = None,
) -> WindowBytes:
    """Of the last `window` tokens of a sequence of `num_tokens`; attention runs in torch's blocked kernel.

    `loss` takes the place of our own.
    """
    with FakeTensorMode(), torch.no_grad():
        run = _WindowRun(policies, form, num_tokens, window, dropout)
        layers = {policy: index for index, policy in enumerate(policies.chosen)}
        trained = {0, *layers.values()} if policies.compiled.trains_layers else set()
        backward = max(map(run.backward, trained), default=0)
        return WindowBytes(run.forward(), backward, run.loss() if loss is None else loss)


class _WindowRun:
    """One layer, its cache and one window, within a FakeTensorMode."""

    def __init__(
        self, policies: LayerPolicies, form: Form, num_tokens: int, window: int, dropout: float
    ) -> None:
        compiled = policies.compiled
        config = replace(compiled.config, num_layers=1)
        self.policies, self.method, self.dtype = policies, compiled.method, _stand_in(compiled.dtype)
        self.start, self.rows = num_tokens - window, window
        self.dropout = Dropout(dropout, "") if dropout else None
        whole, layout = replace(compiled.whole, num_layers=1), compiled.layout
        self.model = Transformer(rank_weights(whole, compiled.dtype, form, layout.tp), num_tokens)
        self.parameters = TrainableParameters(self.model.weights, self.method, JobConfig(), layout)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        heads = config.num_kv_heads, config.head_dim
        self.cache = KVCache(1, num_blocks, BLOCK_SIZE, *heads, self.dtype, CPU)
        group = config.num_heads // config.num_kv_heads
        mask = causal_mask(window, num_tokens, group, self.dtype, CPU)
        part = WindowPart(slice(0, window), slice(0, num_tokens), mask)
        self.paged = PagedWindow(torch.empty(num_blocks * heads[0], dtype=torch.int64), [part])
        wide = accumulation_dtype(self.dtype)
        self.state = GradientState(
            torch.empty(num_tokens, config.hidden_size, dtype=self.dtype),
            *(torch.empty(1, heads[0], num_tokens, heads[1], dtype=wide) for _ in range(2)),
        )
        reserve = Reserve(policies.reserve.tensors, (policies.reserve.labels,))
        self.store = ActivationStore(reserve, num_tokens, self.dtype, wide, CPU, CopiesInTurn())

    def _adapter_run(self, capture: Capture | None) -> AdapterRun:
        weights = self.parameters.weights
        return AdapterRun(0, self.rows, weights, self.dropout, self.start, None, capture)

    def _rotation(self) -> tuple[Tensor, Tensor]:
        return self.model.rotation(torch.empty(self.rows, dtype=torch.int64))

    def forward(self) -> int:
        capture = Capture(slice(0, self.rows), self.store, self.start)
        run = self._adapter_run(capture)
        compiled = self.policies.compiled
        programs = ForwardPrograms(compiled.whole, compiled.layout.tp)
        batch = ForwardContext(
            positions=torch.empty(self.rows, dtype=torch.int64),
            slots=torch.empty(self.rows * self.model.config.num_kv_heads, dtype=torch.int64),
            program=programs.get(run.weights.sites, self.policies.reserve.labels),
            attention=GatheredAttention([self.paged]),
            adapters=[run],
            captures=[capture],
        )
        with LiveBytes() as live:
            x = torch.empty(self.rows, self.model.config.hidden_size, dtype=self.dtype)
            weights = self.model.weights
            context = LayerContext(0, self._rotation(), self.cache, batch, weights.group)
            batch.program(x, weights.layers[0], context)
        return int(live.peak)

    def loss(self) -> int:
        with LiveBytes() as live:
            hidden = torch.empty(self.rows, self.model.config.hidden_size, dtype=self.dtype)
            labels = torch.zeros(self.rows, dtype=torch.int64)
            normed = self.model.final_norm(hidden)
            linear_cross_entropy(normed, self.model.weights.head, labels, 1.0, low_rank=self._head())
        return int(live.peak)

    def _head(self) -> LowRankHead | None:
        pair = self.parameters.weights.low_rank(HEAD)
        if pair is None or not isinstance(self.method, LoraConfig):
            return None
        gradients = (self.parameters.gradients[None, f"{HEAD}.{role}"] for role in "ab")
        return LowRankHead(*pair, self.method.scaling, *gradients)

    def backward(self, layer: int) -> int:
        tokens = slice(self.start, self.start + self.rows)
        program, group = self.policies.program(layer), self.model.weights.group
        with LiveBytes() as live:
            attention = GatheredWindow(self.paged).of_layer(self.cache, 0)
            run, rotation = self._adapter_run(None), self._rotation()
            program(
                self.state.dx[tokens],
                self.model.weights.layers[0],
                BackwardContext(0, tokens, rotation, attention, run, self.state, group),
                self.parameters.weights.layers[0],
                self.parameters.accumulators[0],
                self.store.window(0, tokens),
            )
        return int(live.peak)
