"""One window of a training sequence run on tensors that hold nothing, for the most that it allocates.

As `dry_run.py`, with the kernels that a plan is for: torch's own, or what allocates as Triton's do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.dry_run import BLOCK_SIZE, CPU, Form, rank_weights, stand_in
from services.gpu_worker.finetune.activations import ActivationStore, Reserve
from services.gpu_worker.finetune.backward import BackwardContext, GradientState
from services.gpu_worker.finetune.host_ring import CopiesInTurn
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.optimizer import TrainableParameters
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.window_attention import GatheredWindow, PagedRuns, WindowAttention
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.cross_entropy import LowRankHead
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.model.attention import (
    Attention,
    GatheredAttention,
    PagedAttention,
    PagedWindow,
    WindowPart,
)
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import (
    AdapterRun,
    Capture,
    ForwardContext,
    LayerContext,
)
from services.gpu_worker.model.peft import HEAD, LoraConfig
from services.gpu_worker.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class WindowBytes:
    """The most that is alive at once while a window is computed, beyond what was there before and what is kept."""

    forward_bytes: int  # one layer
    backward_bytes: int  # one layer, with torch's kernels the gathered keys and values included
    loss_bytes: int

    @property
    def peak(self) -> int:
        return max(self.forward_bytes, self.backward_bytes, self.loss_bytes)


def window_bytes(
    policies: LayerPolicies,
    form: Form,
    num_tokens: int,
    window: int,
    dropout: float = 0.0,
    loss: int | None = None,
) -> WindowBytes:
    """Of the last `window` tokens of a sequence of `num_tokens`, with the kernels that the policies are compiled for:
    on torch's, attention runs in its blocked form.

    `loss` takes the place of our own.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # tables of pages are real
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
        self.policies, self.method, self.dtype = policies, compiled.method, stand_in(compiled.dtype)
        self.start, self.rows = num_tokens - window, window
        self.dropout = Dropout(dropout, "") if dropout else None
        whole, layout = replace(compiled.whole, num_layers=1), compiled.layout
        self.kernels = compiled.kernels
        weights = replace(rank_weights(whole, compiled.dtype, form, layout.tp), kernels=self.kernels)
        self.model = Transformer(weights, num_tokens)
        self.parameters = TrainableParameters(self.model.weights, self.method, JobConfig(), layout)
        self.num_blocks = -(-num_tokens // BLOCK_SIZE)
        heads = config.num_kv_heads, config.head_dim
        self.cache = KVCache(1, self.num_blocks, BLOCK_SIZE, *heads, self.dtype, CPU)
        self.attention, self.backward_attention = self._attention(config, num_tokens)
        wide = accumulation_dtype(self.dtype)
        self.state = GradientState(
            torch.empty(num_tokens, config.hidden_size, dtype=self.dtype),
            *(torch.empty(1, heads[0], num_tokens, heads[1], dtype=wide) for _ in range(2)),
        )
        reserve = Reserve(policies.reserve.tensors, (policies.reserve.labels,))
        self.store = ActivationStore(reserve, num_tokens, self.dtype, wide, CPU, CopiesInTurn())

    def _attention(self, config: ModelConfig, num_tokens: int) -> tuple[Attention, WindowAttention]:
        """Of the window in a forward and in a backward."""
        if self.kernels.is_triton:
            tables = [Run(self.rows, num_tokens)], [range(self.num_blocks)]
            batch = PagedBatch.make(*tables, config.num_kv_heads, BLOCK_SIZE, CPU)
            return PagedAttention(batch, self.kernels), PagedRuns(batch, self.kernels)
        group = config.num_heads // config.num_kv_heads
        mask = causal_mask(self.rows, num_tokens, group, self.dtype, CPU)
        part = WindowPart(slice(0, self.rows), slice(0, num_tokens), mask)
        pages = torch.empty(self.num_blocks * config.num_kv_heads, dtype=torch.int64)
        window = PagedWindow(pages, [part])
        return GatheredAttention([window]), GatheredWindow(window)

    def _adapter_run(self, capture: Capture | None) -> AdapterRun:
        weights = self.parameters.weights
        return AdapterRun(0, self.rows, weights, self.dropout, self.start, None, capture)

    def _rotation(self) -> tuple[Tensor, Tensor]:
        return self.model.rotation(torch.empty(self.rows, dtype=torch.int64))

    def forward(self) -> int:
        capture = Capture(slice(0, self.rows), self.store, self.start)
        run = self._adapter_run(capture)
        compiled = self.policies.compiled
        programs = ForwardPrograms(compiled.whole, compiled.layout.tp, self.kernels)
        batch = ForwardContext(
            positions=torch.empty(self.rows, dtype=torch.int64),
            slots=torch.empty(self.rows * self.model.config.num_kv_heads, dtype=torch.int64),
            program=programs.get(run.weights.sites, self.policies.reserve.labels),
            attention=self.attention,
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
            compute = self.kernels.linear_cross_entropy
            compute(normed, self.model.weights.head, labels, 1.0, low_rank=self._head())
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
            attention = self.backward_attention.of_layer(self.cache, 0)
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
