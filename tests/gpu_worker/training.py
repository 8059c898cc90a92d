"""Runs a finetuning job's windows without an engine, cut as a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.compiler.programs import CompiledMethod, ForwardPrograms
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.host_ring import CopyStream
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase, Window
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.reports import StepReport
from services.gpu_worker.finetune.trainer import Trainer, examples_of
from services.gpu_worker.finetune.window_attention import GatheredWindow, PagedRuns, WindowAttention
from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.attention import Attention, GatheredAttention, PagedAttention
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import Capture, ForwardContext
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parallel import ALONE, Group
from services.gpu_worker.model.peft import Method
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import load_weights

BLOCK_SIZE = 4
compiled_methods: dict[tuple[object, ...], CompiledMethod] = {}
CPU = torch.device("cpu")


def make_dataset(lengths: list[int], vocab_size: int, seed: int = 0, masked: float = 0.3) -> Dataset:
    """Random examples; the first `masked` share of each is a prompt without labels."""
    rng = np.random.default_rng(seed)
    masks = [(np.arange(n) >= int(n * masked)).astype(np.uint8) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(3, vocab_size, int(offsets[-1])).astype(np.int32)
    return Dataset(tokens, np.concatenate(masks), offsets)


def make_transformer(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    group: Group = ALONE,
    kernels: Kernels = TORCH,
    device: torch.device = CPU,
    max_position: int = 512,
) -> Transformer:
    return Transformer(load_weights(folder, dtype, device, group=group, kernels=kernels), max_position)


def make_trainer(
    model: Transformer,
    dataset: Dataset,
    *,
    method: Method,
    config: JobConfig | None = None,
    validation: Dataset | None = None,
    policy: int = -1,
    max_tokens_in_flight: int = 256,
    num_host_layers: int = 0,
    layout: Layout = ONE_RANK,
    copies: CopyStream | None = None,
) -> Trainer:
    """`policy` is an index into the method's list; the last keeps least. `layout` is for the model's ranks."""
    config = config or JobConfig(batch_size=len(dataset))
    weights = model.weights
    compiled = compile_method(
        weights.whole,
        method,
        weights.dtype,
        max_tokens_in_flight,
        config.lora_dropout > 0,
        weights.kernels,
        layout,
    )
    job = FinetuneJob(
        job_id="ftjob-test",
        config=config,
        training=examples_of(dataset, method),
        validation=examples_of(validation, method) if validation else None,
        num_layers=model.config.num_layers,
        max_tokens_in_flight=max_tokens_in_flight,
        trains_layers=compiled.trains_layers,
    )
    num_blocks = -(-max_tokens_in_flight // BLOCK_SIZE)
    cache = KVCache(
        model.config.num_layers,
        num_blocks,
        BLOCK_SIZE,
        model.config.num_kv_heads,
        model.config.head_dim,
        weights.dtype,
        weights.device,
    )
    policies = LayerPolicies.uniform(compiled, compiled.policies[policy])
    return Trainer(model, cache, job, dataset, validation, policies, num_host_layers, copies=copies)


def compile_method(
    whole: ModelConfig,
    method: Method,
    dtype: torch.dtype,
    sequence_length: int,
    dropout: bool,
    kernels: Kernels,
    layout: Layout = ONE_RANK,
) -> CompiledMethod:
    """One for all jobs of a process that are alike, as it may be used: compiling takes longest in many a test."""

    def compiled() -> CompiledMethod:
        return CompiledMethod(
            whole,
            method,
            dtype=dtype,
            sequence_length=sequence_length,
            dropout=dropout,
            layout=layout,
            kernels=kernels,
        )

    if layout is not ONE_RANK:
        return compiled()
    key = whole, method, dtype, sequence_length, dropout, kernels
    if key not in compiled_methods:
        compiled_methods[key] = compiled()
    return compiled_methods[key]


@cache
def forward_programs(whole: ModelConfig, tp: int, kernels: Kernels) -> ForwardPrograms:
    return ForwardPrograms(whole, tp, kernels)


def forward(trainer: Trainer, window: Window) -> None:
    """Through all layers, through one, or the loss."""
    model, cache = trainer._model, trainer._cache
    if window.layer == model.config.num_layers:
        trainer.finish_forward(window)
    elif window.layer is not None:
        trainer.forward(window, forward_context(trainer, window))
    else:
        hidden = model.forward(trainer.tokens(window), cache, forward_context(trainer, window))
        trainer.finish_forward(window, hidden)


def forward_context(trainer: Trainer, window: Window) -> ForwardContext:
    model, cache = trainer._model, trainer._cache
    evaluation = trainer.job.sequence.evaluation
    positions = range(window.start, window.end)
    blocks = [trainer.job.blocks[p // BLOCK_SIZE] for p in positions]
    run = trainer.adapter_run(window, 0)
    kept = frozenset() if evaluation else trainer.policies.reserve.labels
    programs = forward_programs(model.weights.whole, model.weights.group.size, model.weights.kernels)
    return ForwardContext(
        positions=trainer.positions(window),
        slots=cache.slots(blocks, [p % BLOCK_SIZE for p in positions]),
        program=programs.get(run.weights.sites, kept),
        attention=_alone(trainer.attention(window)),
        adapters=[run],
        captures=[] if evaluation else [Capture(slice(0, window.num_tokens), trainer.store, window.start)],
    )


def _alone(window: WindowAttention) -> Attention:
    """Of a stream of the window's rows and no others."""
    if isinstance(window, GatheredWindow):
        return GatheredAttention([window.window])
    assert isinstance(window, PagedRuns)
    return PagedAttention(window.batch, window.kernels)


def advance(trainer: Trainer, window_size: Callable[[], int]) -> StepReport:
    """Computes until the next optimizer step is due, or an evaluation is done; returns its report. A sequence's first
    window goes forward through all layers at once, the others layer by layer.

    After an optimizer step's windows the gradients stay for the test to read; call `trainer.optimizer_step`.
    """
    job = trainer.job
    job.blocks = list(range(trainer._cache.num_blocks - 1, -1, -1))  # not in order: tables are looked up
    while job.phase in (Phase.FORWARD, Phase.BACKWARD):
        if job.phase is Phase.FORWARD:
            is_first = job.position == job.layer == 0
            if is_first:
                trainer.begin(job.sequence)
            window = (job.next_window if is_first else job.next_step)(window_size())
            forward(trainer, window)
        else:
            window = job.next_step(window_size())
            trainer.backward(window)
        job.complete(window)
    if job.phase is Phase.REPORT:
        job.complete_report()
        return trainer.end_evaluation()()
    return StepReport(job.step)


def backward_peak(
    trainer: Trainer, window_tokens: int, counted: Callable[[], AbstractContextManager[LiveBytes]]
) -> int:
    """Takes the job's first sequence through its windows; the most bytes that one's backward has made at once."""
    job, held = trainer.job, []
    trainer.begin(job.sequence)
    while job.phase in (Phase.FORWARD, Phase.BACKWARD):
        if job.phase is Phase.FORWARD:
            window = job.next_window(window_tokens)
            forward(trainer, window)
        else:
            window = job.next_step(window_tokens)
            trainer.attention(window)
            with counted() as live:
                trainer.backward(window)
            held.append(live.peak)
        job.complete(window)
    return max(held)
