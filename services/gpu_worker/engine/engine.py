"""`Engine.step` is the whole system: schedule, run, update."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from services.gpu_worker.compiler.layout import choose_layout
from services.gpu_worker.engine.admission import Admission, Offload
from services.gpu_worker.engine.attainment import Attainment
from services.gpu_worker.engine.batch import Batch, Timing, Update
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.lanes import NUM_LANES, Lanes
from services.gpu_worker.engine.latency import LatencyModel
from services.gpu_worker.engine.memory import MemoryAccount, cache_bytes, free_bytes, total_bytes
from services.gpu_worker.engine.memory_watch import MemoryWatch
from services.gpu_worker.engine.model_runner import ModelRunner, RunResult
from services.gpu_worker.engine.profile import extent_of, profile
from services.gpu_worker.engine.profile_cache import ProfileCache, key_of
from services.gpu_worker.engine.scheduler import Progress, Scheduler, SchedulerConfig
from services.gpu_worker.engine.sequence import Logprob, Sampling, Sequence
from services.gpu_worker.engine.slo import DEFAULT_SLO, DEFAULT_TIER, SLO
from services.gpu_worker.finetune.checkpoint import load_checkpoint, save_checkpoint
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase
from services.gpu_worker.finetune.memory import JobMemory
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.trainer import StepReport, Trainer, examples_of
from services.gpu_worker.kernels.backend import KernelChoice, choose_kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.quantised import GROUP_SIZE, quantise
from services.gpu_worker.model.adapters import AdapterPool
from services.gpu_worker.model.parallel import ALONE, Group
from services.gpu_worker.model.peft import LoraConfig, Method, num_virtual_tokens
from services.gpu_worker.model.peft_files import read_peft, write_peft
from services.gpu_worker.model.transformer import VIRTUAL_TOKEN, Transformer
from services.gpu_worker.model.weights import MakeLinear, ModelWeights, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InvalidRequest(ValueError):
    """A request that the engine cannot serve; nobody else is affected."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int = 0  # 0: all cores
    kernels: KernelChoice = "auto"  # auto: Triton's on a GPU, torch's elsewhere
    cuda_graphs: bool = True  # forwards over decodes alone are recorded; with Triton's kernels on a GPU
    lanes: bool = True  # two halves of a CPU's threads may work at once
    quantise: Literal["none", "int8", "int4"] = "none"  # the layers' linears; embedding and head stay dense
    int4_group_size: int = GROUP_SIZE  # inputs that share a scale
    block_size: int = 16
    kv_cache_bytes: int = 0  # 0: a share of the free memory
    max_adapters: int = 16
    max_lora_rank: int = 128
    max_finetune_jobs: int = 4
    finetune_tokens_in_flight: int = 2048
    finetune_bytes: int = 0  # of all jobs together; 0: a share of what weights, cache and adapters leave
    activation_bytes: int = 0  # that one job keeps if it can; 0: its part of these
    offload_activations: Offload = "auto"  # to host memory; auto: what a GPU has no room for
    slos: Mapping[str, SLO] = field(default_factory=lambda: {DEFAULT_TIER: DEFAULT_SLO})  # by tier
    profile_dir: Path | None = None  # keeps latency profiles from one start to the next; None: none is kept
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if DEFAULT_TIER not in self.slos:
            raise ValueError(f"slos: there is no tier {DEFAULT_TIER!r} among {sorted(self.slos)}")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a request, its end, or both."""

    request_id: str
    token: int | None
    finish: str | None = None  # stop, length
    logprob: Logprob | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Logprob | None] | None = None  # with the first event, where asked for


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A report of a job, its completion (`finished`), or its failure."""

    job_id: str
    report: StepReport | None = None
    finished: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class IterationStats:
    """What one iteration was made of; tokens by kind, milliseconds planned and measured."""

    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_forward_tokens: int = 0  # of training and evaluation windows
    num_backward_tokens: float = 0.0  # token-layers / layers
    limit_ms: float = 0.0
    predicted_ms: float = 0.0
    timing: Timing = field(default_factory=Timing)
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0


@dataclass(slots=True)
class StepResult:
    tokens: list[TokenEvent] = field(default_factory=list)
    jobs: list[JobEvent] = field(default_factory=list)
    stats: IterationStats = field(default_factory=IterationStats)


class Engine:
    def __init__(
        self, config: EngineConfig, group: Group = ALONE, weights: ModelWeights | None = None
    ) -> None:
        """Of several ranks each has an engine with its part of the model; `engine/group.py` keeps them in step.

        `weights`, already on the device, stand in for those of `model_dir`, which is not read then.
        """
        self.config = config
        self.group = group
        device = device_of(config.device)
        if device.type == "cpu" and config.num_threads:
            torch.set_num_threads(config.num_threads)
        make = _make_linear(config)
        kernels = choose_kernels(config.kernels, device)
        dtype = _dtype(config.dtype, device)
        weights = weights or load_weights(config.model_dir, dtype, device, make, group)
        weights = replace(weights, kernels=kernels)
        self.max_model_len = min(config.scheduler.max_model_len, weights.config.max_position)
        longest = max(self.max_model_len, min(config.finetune_tokens_in_flight, weights.config.max_position))
        self.model = Transformer(weights, longest)
        ranks_beside = group.size if device.type == "cpu" else 1  # in the same memory
        free = group.least(free_bytes(device) // ranks_beside)
        self.cache = self._make_cache(device, free)
        self.adapters = AdapterPool(config.max_adapters)
        self.runner = ModelRunner(self.model, self.cache, self.adapters, self._make_lanes(device))
        if config.cuda_graphs and kernels.is_triton and device.type == "cuda" and group.size == 1:
            self.runner.record_decodes(config.scheduler.max_num_seqs, self.max_model_len)
        self.admission = self._make_admission()
        self.admission.set_budget(config.finetune_bytes, free - self.cache.size_bytes, config.max_adapters)
        self.blocks = BlockManager(self.cache.num_blocks, config.block_size)
        policies = self.admission.usual_policies()
        latency, lane_latency = self._make_latency(policies), None
        if self.runner.lanes:
            with self.runner.lanes.threads_of_one():
                lane_latency = self._make_latency(policies)
        self.scheduler = Scheduler(config.scheduler, self.blocks, latency, lane_latency)
        self.scheduler.finetuning.can_give_back = group.size == 1  # clocks of several ranks differ
        slack_ms = self.scheduler.slack_beside_decodes_ms(config.slos[DEFAULT_TIER].tpot_ms)
        self.admission.set_pace(policies, latency, config.scheduler.min_window, slack_ms)
        self._watch = MemoryWatch(weights, self.scheduler, self.runner.trainers, self.admission.can_move)
        self.attainment = Attainment(config.slos)
        self._sequences: dict[str, Sequence] = {}
        self._jobs: dict[str, FinetuneJob] = {}
        self._early_results: list[RunResult] = []  # of what was computed between two steps

    def _make_cache(self, device: torch.device, free: int) -> KVCache:
        config, dtype = self.model.config, self.model.weights.dtype
        block_bytes = 2 * config.num_layers * config.kv_size * dtype.itemsize * self.config.block_size
        num_blocks = (self.config.kv_cache_bytes or cache_bytes(device, free)) // block_bytes
        if num_blocks * self.config.block_size < self.max_model_len:
            raise ValueError(
                f"the key/value cache holds {num_blocks * self.config.block_size} tokens, fewer than one "
                f"sequence of {self.max_model_len}: raise kv_cache_bytes or lower max_model_len"
            )
        return KVCache(
            config.num_layers,
            num_blocks,
            self.config.block_size,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            device,
        )

    def _make_lanes(self, device: torch.device) -> Lanes | None:
        num_threads = torch.get_num_threads()
        possible = device.type == "cpu" and num_threads % NUM_LANES == 0 and self.group.size == 1
        return Lanes(num_threads) if possible and self.config.lanes else None

    def _make_admission(self) -> Admission:
        config = self.config
        return Admission(
            self.model.weights,
            config.max_finetune_jobs,
            min(config.finetune_tokens_in_flight, self.cache.num_blocks * config.block_size),
            config.max_lora_rank,
            config.offload_activations,
            config.activation_bytes,
            NUM_LANES if self.runner.lanes else 1,
            config.scheduler.min_window,
        )

    def _make_latency(self, policies: LayerPolicies) -> LatencyModel:
        config, limits, weights = self.config, self.config.scheduler, self.model.weights
        rows = limits.max_num_batched_tokens + limits.finetune_window
        sizes = limits.max_num_seqs, self.max_model_len, rows, limits.finetune_window
        extent = extent_of(self.runner, *sizes)
        if config.profile_dir is None:
            return profile(self.runner, extent, policies, grain=limits.min_window)
        form = f"{config.quantise}/{config.int4_group_size}" if config.quantise == "int4" else config.quantise
        key = key_of(weights, form, extent, config.block_size, policies)
        return profile(
            self.runner, extent, policies, ProfileCache(config.profile_dir, key), limits.min_window
        )

    # --- one iteration

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> StepResult:
        """One co-serving iteration; returns at once, empty, where nothing can be computed."""
        self._watch.look(self._now_s())
        batch = self.scheduler.schedule(self._now_s())
        if batch.is_empty:
            return StepResult(jobs=self._job_events(RunResult()), stats=self._stats(batch, Timing()))
        result = self._run(batch)
        self.scheduler.give_back(batch, result.num_steps)
        progress = self.scheduler.update(batch, result.sampled, self._now_s())
        self._learn(batch, result.timing)
        return StepResult(
            [self._token_event(item) for item in progress],
            self._job_events(result),
            self._stats(batch, result.timing),
        )

    def _now_s(self) -> float:
        return time.monotonic()

    def _run(self, batch: Batch) -> RunResult:
        return self.runner.run(batch)

    def _learn(self, batch: Batch, timing: Timing) -> None:
        latency = self.scheduler.latency if batch.num_lanes == 1 else self.scheduler.lane_latency
        assert latency is not None
        for lane, times in enumerate(timing.lanes):
            works = [step.work for step in batch.backwards if step.lane == lane]
            latency.observe(batch.forward_work(lane), times.forward_ms, works, times.backward_ms)
        share = sum((update.share for update in batch.updates), 0.0)
        if share:
            self.scheduler.latency.observe_update(timing.optimizer_ms / share)

    def _token_event(self, item: Progress) -> TokenEvent:
        sequence = item.sequence
        if item.finish is not None:
            self.attainment.finish(sequence, self._now_s())
            self._forget(sequence)
        first = sequence.num_output_tokens <= 1
        return TokenEvent(
            sequence.request_id,
            item.sampled.token if item.sampled else None,
            item.finish,
            item.sampled.logprob if item.sampled else None,
            max(0, sequence.num_cached_tokens - sequence.num_virtual_tokens),
            sequence.prompt_logprobs if first and sequence.sampling.prompt_logprobs is not None else None,
        )

    def _job_events(self, result: RunResult) -> list[JobEvent]:
        events: list[JobEvent] = []
        for own in (*self._early_results, result):
            events += [JobEvent(job_id, report) for job_id, report in own.reports if job_id in self._jobs]
            for job_id, error in own.failures:
                self.remove_job(job_id)
                events.append(JobEvent(job_id, error=error))
        self._early_results.clear()
        for job in list(self._jobs.values()):
            if job.phase is Phase.DONE and job in self.scheduler.jobs:
                self.scheduler.remove_job(job)
                events.append(JobEvent(job.job_id, finished=True))
        return events

    def _stats(self, batch: Batch, timing: Timing) -> IterationStats:
        backward = sum(work.num_tokens for work in batch.backwards)
        return IterationStats(
            len(batch.decodes),
            batch.num_prompt_tokens,
            batch.num_forward_tokens,
            backward / self.model.config.num_layers,
            batch.limit_ms,
            batch.predicted_ms,
            timing,
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            self.blocks.num_free_blocks,
        )

    def memory(self) -> MemoryAccount:
        """What everybody holds now, from the tensors that are there."""
        jobs = sum((trainer.memory for trainer in self.runner.trainers.values()), JobMemory())
        device = {
            "weights": self.model.size_bytes,
            "kv_cache": self.cache.size_bytes,
            "adapters": self.adapters.size_bytes,
        }
        return MemoryAccount(
            device | jobs.on_device(), jobs.on_host(), self.admission.budget, total_bytes(self.cache.device)
        )

    # --- requests

    def add(
        self,
        request_id: str,
        prompt: list[int],
        sampling: Sampling,
        *,
        emitted: list[int] | None = None,
        adapter: str | None = None,
        cache_salt: str = "",
        tier: str = DEFAULT_TIER,
        waited_s: float = 0.0,
    ) -> None:
        """Queues a request; `emitted` are tokens that an earlier worker has already generated for it.

        `adapter` is the digest of a loaded adapter, pinned until the request ends. `tier` names one of the
        config's service levels; `waited_s` of its time to the first token have passed. Raises InvalidRequest.
        """
        if tier not in self.config.slos:
            raise InvalidRequest(f"tier {tier!r} is none of {sorted(self.config.slos)}")
        self._check(request_id, prompt, emitted or [], sampling, adapter)
        virtual = self._num_virtual_tokens(adapter)
        if adapter is not None:
            self.adapters.pin(adapter)
        sequence = Sequence(
            request_id,
            [VIRTUAL_TOKEN] * virtual + list(prompt) + (emitted or []),
            virtual + len(prompt),
            sampling,
            adapter,
            _cache_seed(adapter, cache_salt),
            tier,
            self.config.slos[tier],
            virtual,
            num_resumed_tokens=len(emitted or []),
            arrival_s=self._now_s() - waited_s,
        )
        self._sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def _check(
        self, request_id: str, prompt: list[int], emitted: list[int], sampling: Sampling, adapter: str | None
    ) -> None:
        vocab = self.model.config.vocab_size
        if request_id in self._sequences:
            raise InvalidRequest(f"request {request_id} is already running")
        if not prompt or min(prompt + emitted) < 0 or max(prompt + emitted) >= vocab:
            raise InvalidRequest(f"the prompt needs at least one token, each in [0, {vocab})")
        problem = sampling.find_problem(vocab)
        if problem is not None:
            raise InvalidRequest(problem)
        if emitted and len(emitted) >= sampling.max_tokens:
            raise InvalidRequest(f"all {sampling.max_tokens} tokens have been generated already")
        if adapter is not None and adapter not in self.adapters:
            raise InvalidRequest(f"adapter {adapter} is not loaded")
        virtual = self._num_virtual_tokens(adapter)
        if virtual + len(prompt) + sampling.max_tokens > self.max_model_len:
            learned = f", {virtual} of the adapter" if virtual else ""
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens{learned} and {sampling.max_tokens} to generate exceed "
                f"{self.max_model_len}"
            )

    def _num_virtual_tokens(self, adapter: str | None) -> int:
        return 0 if adapter is None else self.adapters.get(adapter).num_virtual_tokens

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds; unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.attainment.abort(sequence, self._now_s())
            self.scheduler.abort(sequence)
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.adapter is not None:
            self.adapters.unpin(sequence.adapter)

    def load_adapter(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Makes PEFT's two files servable; raises InvalidAdapter, or InvalidRequest when every slot is pinned."""
        if digest in self.adapters:
            return
        if not self.adapters.can_load():
            raise InvalidRequest(f"all {self.adapters.capacity} adapter slots are in use")
        weights = self.model.weights
        choose = partial(choose_layout, weights)
        self.adapters.load(digest, read_peft(weights, files, self.config.max_lora_rank, choose))

    # --- jobs

    def can_add_job(self) -> bool:
        return len(self._jobs) < self.config.max_finetune_jobs and not self.admission.is_full

    def add_job(
        self,
        job_id: str,
        config: JobConfig,
        method: Method,
        training: Dataset,
        validation: Dataset | None = None,
        *,
        tenant: str = "",
        weight: float = 1.0,
        checkpoint: Mapping[str, bytes] | None = None,
    ) -> FinetuneJob:
        """Starts a job, or continues it from a checkpoint's files. Jobs of one tenant share its turns, which are
        worth its weight.

        Raises ValueError for what cannot run, JobMustWait for what does not fit beside the jobs that run.
        """
        if isinstance(method, LoraConfig) and method.rank > self.config.max_lora_rank:
            raise ValueError(f"rank {method.rank} exceeds {self.config.max_lora_rank}")
        lengths = examples_of(training, method)
        held_out = examples_of(validation, method) if validation else None
        plan = self.admission.find_plan(method, config, lengths, held_out)
        job = FinetuneJob(
            job_id,
            config,
            lengths,
            held_out,
            self.model.config.num_layers,
            plan.max_tokens,
            self.admission.grain,
            weight,
            trains_layers=plan.policies.compiled.trains_layers,
            can_park=plan.can_park,
            tenant=tenant,
        )
        longest = self.model.max_position - num_virtual_tokens(method)
        for dataset in filter(None, (training, validation)):
            dataset.check(self.model.config.vocab_size, longest)
        trainer = Trainer(
            self.model,
            self.cache,
            job,
            training,
            validation,
            plan.policies,
            plan.num_host_layers,
            self.admission.num_lanes,
        )
        job.num_update_parts = trainer.parameters.num_parts
        if checkpoint is not None:
            load_checkpoint(trainer, checkpoint)
        self.admission.reserve(job_id, plan)
        self.runner.trainers[job_id] = trainer
        self._jobs[job_id] = job
        self.scheduler.add_job(job)
        return job

    def remove_job(self, job_id: str) -> None:
        """Stops a job and frees what it holds; unknown ids are ignored."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        if job in self.scheduler.jobs:
            self.scheduler.remove_job(job)
        del self.runner.trainers[job_id]
        self.admission.release(job_id)

    def job(self, job_id: str) -> FinetuneJob:
        return self._jobs[job_id]

    def checkpoint_job(self, job_id: str) -> dict[str, bytes]:
        """The job's state after its last optimizer step, as files."""
        self._end_update(job_id)
        return save_checkpoint(self.runner.trainers[job_id])

    def export_job(self, job_id: str, base_model: str) -> dict[str, bytes]:
        """The job's adapter as PEFT's two files."""
        self._end_update(job_id)
        parameters = self.runner.trainers[job_id].parameters
        values = parameters.whole_masters()
        return write_peft(self.model.weights.whole, parameters.weights.method, base_model, values)

    def _end_update(self, job_id: str) -> None:
        """Finishes an optimizer step of which only some parts have moved; its report comes with the next `step`."""
        job = self._jobs[job_id]
        if job.updated_parts:
            rest = Batch(updates=[Update(job, job.updated_parts, job.num_update_parts)])
            self._early_results.append(self._run(rest))
            self.scheduler.update(rest, [], self._now_s())

    def trained_tokens(self, job_id: str) -> int:
        return self.runner.trainers[job_id].trained_tokens


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16, which both GPUs and CPUs with AVX512-BF16 or AMX compute fast; else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _make_linear(config: EngineConfig) -> MakeLinear:
    if config.quantise == "none":
        return DenseLinear
    return partial(quantise, scheme=config.quantise, group_size=config.int4_group_size)


def _cache_seed(adapter: str | None, salt: str) -> bytes:
    """Keys and values depend on the adapter version; the salt keeps tenants apart."""
    return hashlib.blake2b(f"{adapter}|{salt}".encode(), digest_size=32).digest()
