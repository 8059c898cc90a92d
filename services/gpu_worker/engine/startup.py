"""What an engine is made of at its start: model, cache, lanes, memory for jobs, and the times of the machine."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch

from services.gpu_worker.engine.admission import Admission
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.config import (
    EngineConfig,
    dtype_of,
    is_asynchronous,
    make_linear,
    may_use_side_stream,
)
from services.gpu_worker.engine.decode_graphs import SHARE as GRAPHS_SHARE
from services.gpu_worker.engine.fit import Extent
from services.gpu_worker.engine.interference import Interference
from services.gpu_worker.engine.lanes import NUM_LANES, Lanes
from services.gpu_worker.engine.latency import LatencyModel
from services.gpu_worker.engine.memory import cache_bytes
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.profile import extent_of, measure_interference, profile
from services.gpu_worker.engine.profile_cache import ProfileCache, key_of
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.engine.side_stream import make_side_stream
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.kernels.backend import choose_kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.parallel import Group
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import ModelWeights, load_weights


def make_model(
    config: EngineConfig, device: torch.device, group: Group, weights: ModelWeights | None
) -> Transformer:
    """With positions for the longest request and the longest training sequence; `weights` as `Engine` takes them."""
    kernels = choose_kernels(config.kernels, device)
    dtype = dtype_of(config.dtype, device)
    weights = weights or load_weights(config.model_dir, dtype, device, make_linear(config), group)
    longest = max(config.scheduler.max_model_len, config.finetune_tokens_in_flight)
    return Transformer(replace(weights, kernels=kernels), min(longest, weights.config.max_position))


def make_cache(config: EngineConfig, model: Transformer, max_model_len: int, free: int) -> KVCache:
    """In `free` bytes of the model's device; raises ValueError where not one sequence of `max_model_len` fits."""
    sizes, weights = model.config, model.weights
    block_bytes = 2 * sizes.num_layers * sizes.kv_size * weights.dtype.itemsize * config.block_size
    num_blocks = (config.kv_cache_bytes or cache_bytes(weights.device, free)) // block_bytes
    if num_blocks * config.block_size < max_model_len:
        raise ValueError(
            f"the key/value cache holds {num_blocks * config.block_size} tokens, fewer than one "
            f"sequence of {max_model_len}: raise kv_cache_bytes or lower max_model_len"
        )
    return KVCache(
        sizes.num_layers,
        num_blocks,
        config.block_size,
        sizes.num_kv_heads,
        sizes.head_dim,
        weights.dtype,
        weights.device,
    )


def make_lanes(config: EngineConfig, device: torch.device, group: Group) -> Lanes | None:
    num_threads = torch.get_num_threads()
    possible = device.type == "cpu" and num_threads % NUM_LANES == 0 and group.size == 1
    return Lanes(num_threads) if possible and config.lanes else None


def record_decodes(config: EngineConfig, runner: ModelRunner, max_model_len: int, free: int) -> int:
    """Has decodes recorded where they can be; returns the part of the `free` bytes that recordings may take."""
    device, weights = runner.cache.device, runner.model.weights
    possible = weights.kernels.is_triton and device.type == "cuda" and weights.group.size == 1
    if not (possible and config.cuda_graphs):
        return 0
    budget = int(free * GRAPHS_SHARE)
    runner.record_decodes(config.scheduler.max_num_seqs, max_model_len, budget)
    return budget


def make_admission(config: EngineConfig, runner: ModelRunner) -> Admission:
    cache = runner.cache
    return Admission(
        runner.model.weights,
        config.max_finetune_jobs,
        min(config.finetune_tokens_in_flight, cache.num_blocks * cache.block_size),
        config.max_lora_rank,
        config.offload_activations,
        config.activation_bytes,
        NUM_LANES if runner.lanes else 1,
        config.scheduler.min_window,
    )


def make_scheduler(
    config: EngineConfig,
    runner: ModelRunner,
    blocks: BlockManager,
    max_model_len: int,
    policies: LayerPolicies,
) -> Scheduler:
    """By the times of this machine, training with these policies.

    Of two iterations that are under way at once, an arrival waits for the rest of one and all of the other. Steps of
    the backward can be given back where the host sees in time how late an iteration is: a GPU has been given all of
    it by then, and clocks of several ranks differ.
    """
    device, num_ranks = runner.device, runner.model.weights.group.size
    extent = measured_extent(config, runner, max_model_len)
    latency, lane_latency = make_latency(config, runner, extent, policies), None
    if runner.lanes:
        with runner.lanes.threads_of_one():
            lane_latency = make_latency(config, runner, extent, policies)
    limits, runs_ahead = config.scheduler, is_asynchronous(config, device, num_ranks)
    if runs_ahead:
        limits = replace(limits, idle_ms=limits.idle_ms / 2)
    scheduler = Scheduler(limits, blocks, latency, lane_latency)
    scheduler.finetuning.can_give_back = device.type == "cpu" and num_ranks == 1 and not runs_ahead
    if may_use_side_stream(config, device, num_ranks) and config.max_finetune_jobs:
        scheduler.finetuning.interference = find_interference(config, runner, extent, policies)
    return scheduler


def measured_extent(config: EngineConfig, runner: ModelRunner, max_model_len: int) -> Extent:
    """Up to where times are measured: what one iteration may hold."""
    limits = config.scheduler
    rows = limits.max_num_batched_tokens + limits.finetune_window
    return extent_of(runner, limits.max_num_seqs, max_model_len, rows, limits.finetune_window)


def make_latency(
    config: EngineConfig, runner: ModelRunner, extent: Extent, policies: LayerPolicies
) -> LatencyModel:
    """Of a machine that trains with these policies, on the threads that torch has now."""
    if config.latency is not None:
        return deepcopy(config.latency)  # with corrections of its own
    grain = config.scheduler.min_window
    if config.profile_dir is None:
        return profile(runner, extent, policies, grain=grain)
    form = f"{config.quantise}/{config.int4_group_size}" if config.quantise == "int4" else config.quantise
    key = key_of(runner.model.weights, form, extent, config.block_size, policies)
    return profile(runner, extent, policies, ProfileCache(config.profile_dir, key), grain)


def find_interference(
    config: EngineConfig, runner: ModelRunner, extent: Extent, policies: LayerPolicies
) -> Interference | None:
    """Measured on a side stream, which stays where it is worth it."""
    runner.side = make_side_stream(runner.cache.device)
    found = measure_interference(runner, extent, policies, config.backward_stream)
    if found is None:
        runner.side = None
    return found
