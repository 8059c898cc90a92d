"""`Engine.step` is the whole system: schedule, run, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from services.gpu_worker.compiler.layout import choose_layout
from services.gpu_worker.engine.attainment import Attainment
from services.gpu_worker.engine.batch import Batch, Progress, Timing, Update
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.config import (
    EngineConfig,
    device_of,
    is_asynchronous,
    may_use_side_stream,
)
from services.gpu_worker.engine.events import IterationStats, JobEvent, StepResult, TokenEvent
from services.gpu_worker.engine.in_flight import InFlight, RunResult
from services.gpu_worker.engine.jobs import Jobs
from services.gpu_worker.engine.memory import (
    MemoryAccount,
    free_bytes,
    pool_bytes,
    restart_peak,
    total_bytes,
)
from services.gpu_worker.engine.memory_watch import MemoryWatch
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.requests import InvalidRequest, Requests
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER
from services.gpu_worker.engine.startup import (
    find_interference,
    make_admission,
    make_cache,
    make_lanes,
    make_latency,
    make_model,
    measured_extent,
    record_decodes,
)
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase
from services.gpu_worker.finetune.memory import JobMemory
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.parallel import ALONE, Group
from services.gpu_worker.model.peft import Method
from services.gpu_worker.model.peft_files import read_peft
from services.gpu_worker.model.weights import ModelWeights


@dataclass(slots=True)
class _Launched:
    """An iteration that is under way; of the jobs that ran then, those that it has brought to their end."""

    batch: Batch
    flight: InFlight | None  # None where there is nothing to compute
    ends_s: float  # as predicted
    jobs: dict[str, FinetuneJob]
    finished: list[FinetuneJob]

    @property
    def is_empty(self) -> bool:
        return self.flight is None and not self.finished


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
        self.is_asynchronous = is_asynchronous(config, device, group.size)
        if device.type == "cpu" and config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.model = make_model(config, device, group, weights)
        self.max_model_len = min(config.scheduler.max_model_len, self.model.config.max_position)
        ranks_beside = group.size if device.type == "cpu" else 1  # in the same memory
        free = group.least(free_bytes(device) // ranks_beside)
        self.cache = make_cache(config, self.model, self.max_model_len, free)
        self.adapters = AdapterPool(config.max_adapters)
        self.runner = ModelRunner(self.model, self.cache, self.adapters, make_lanes(config, device, group))
        left = free - self.cache.size_bytes
        left -= record_decodes(config, self.runner, self.max_model_len, left)
        self.admission = make_admission(config, self.runner)
        self.admission.set_budget(config.finetune_bytes, left, config.max_adapters)
        self.blocks = BlockManager(self.cache.num_blocks, config.block_size)
        policies = self.admission.usual_policies()
        extent = measured_extent(config, self.runner, self.max_model_len)
        latency, lane_latency = make_latency(config, self.runner, extent, policies), None
        if self.runner.lanes:
            with self.runner.lanes.threads_of_one():
                lane_latency = make_latency(config, self.runner, extent, policies)
        self.scheduler = Scheduler(self._limits(), self.blocks, latency, lane_latency)
        self.scheduler.finetuning.can_give_back = self._follows_clock(device)
        if may_use_side_stream(config, device, group.size) and config.max_finetune_jobs:
            self.scheduler.finetuning.interference = find_interference(config, self.runner, extent, policies)
        slack_ms = self.scheduler.slack_beside_decodes_ms(config.slos[DEFAULT_TIER].tpot_ms)
        self.admission.set_pace(policies, latency, config.scheduler.min_window, slack_ms)
        self._watch = MemoryWatch(
            self.model.weights, self.scheduler, self.runner.trainers, self.admission.can_move
        )
        self.attainment = Attainment(config.slos)
        self._requests = Requests(
            config.slos, self.adapters, self.model.config.vocab_size, self.max_model_len
        )
        self._jobs = Jobs(self.runner, self.admission, config.max_finetune_jobs, config.max_lora_rank)
        self._launched: deque[_Launched] = deque()  # not settled yet, the oldest first
        restart_peak(device)  # loading the model and measuring it is over

    def _limits(self) -> SchedulerConfig:
        """Of two iterations that are under way at once, an arrival waits for the rest of one and all of the other."""
        limits = self.config.scheduler
        return replace(limits, idle_ms=limits.idle_ms / 2) if self.is_asynchronous else limits

    def _follows_clock(self, device: torch.device) -> bool:
        """Whether the host sees in time how late an iteration is: a GPU has been given all of it by then, and clocks
        of several ranks differ."""
        return device.type == "cpu" and self.group.size == 1 and not self.is_asynchronous

    # --- one iteration

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._launched)

    def step(self) -> StepResult:
        """One co-serving iteration; returns at once, empty, where nothing can be computed.

        Asynchronous steps launch an iteration and return what the one before has found.
        """
        self._watch.look(self._now_s())
        result = StepResult(stats=self._stats(Batch(), Timing()))
        if self.is_asynchronous and not self._launched:
            self._launch()
        newest = self._launch()
        while self._launched and not (self.is_asynchronous and self._launched[0] is newest):
            self._settle(self._launched.popleft(), result)
        return result

    def _launch(self) -> _Launched:
        batch = self.scheduler.schedule(self._next_begin_s())
        return self._enter(batch)

    def _enter(self, batch: Batch) -> _Launched:
        """Computes a batch behind those under way, and counts it as done, but for the tokens."""
        begins_s = self._next_begin_s()
        flight = None if batch.is_empty else self._compute(batch)
        if flight is not None:
            self.scheduler.give_back(batch, flight.num_steps)
        ends_s = begins_s + batch.predicted_ms / 1000
        self.scheduler.advance(batch, ends_s)
        for job_id, _ in flight.failures if flight else ():
            self._stop(self._jobs.get(job_id))
        finished = [job for job in self.scheduler.jobs if job.phase is Phase.DONE]
        for job in finished:
            self.scheduler.remove_job(job)
        launched = _Launched(batch, flight, ends_s, self._jobs.all(), finished)
        if not launched.is_empty:
            self._launched.append(launched)
        return launched

    def _next_begin_s(self) -> float:
        """When what is launched now will begin."""
        now_s = self._now_s()
        before = self._launched[-1] if self._launched else None
        if before is None or before.flight is None or before.flight.is_done:
            return now_s
        return max(now_s, before.ends_s)

    def _settle(self, launched: _Launched, result: StepResult) -> None:
        """Takes what an iteration has found into the result."""
        found = self._collect(launched.flight) if launched.flight else RunResult()
        if self._launched:  # begins now, whatever was predicted of this one
            self._launched[0].ends_s = self._now_s() + self._launched[0].batch.predicted_ms / 1000
        for item in self.scheduler.receive(found.sampled, self._now_s()):
            result.tokens.append(self._token_event(item))
        if launched.flight:
            self._learn(launched.batch, found.timing)
        result.jobs += self._job_events(launched, found)
        result.stats = self._stats(launched.batch, found.timing)

    def _now_s(self) -> float:
        return time.monotonic()

    def _compute(self, batch: Batch) -> InFlight:
        return self.runner.launch(batch)

    def _collect(self, flight: InFlight) -> RunResult:
        return flight.collect()

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
            self._requests.release(sequence)
        first = sequence.num_output_tokens <= 1
        return TokenEvent(
            sequence.request_id,
            item.sampled.token if item.sampled else None,
            item.finish,
            item.sampled.logprob if item.sampled else None,
            max(0, sequence.num_cached_tokens - sequence.num_virtual_tokens),
            sequence.prompt_logprobs if first and sequence.sampling.prompt_logprobs is not None else None,
        )

    def _job_events(self, launched: _Launched, found: RunResult) -> list[JobEvent]:
        """Of jobs that nobody has removed meanwhile."""

        def is_here(job_id: str) -> bool:
            job = self._jobs.find(job_id)
            return job is not None and job is launched.jobs.get(job_id)

        events = [JobEvent(job_id, report) for job_id, report in found.reports if is_here(job_id)]
        for job_id, error in found.failures:
            if is_here(job_id):
                self.remove_job(job_id)
                events.append(JobEvent(job_id, error=error))
        events += [JobEvent(job.job_id, finished=True) for job in launched.finished if is_here(job.job_id)]
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
        if self.runner.decode_graphs is not None:
            device["decode_graphs"] = self.runner.decode_graphs.size_bytes
        return MemoryAccount(
            device | jobs.on_device(),
            jobs.on_host(),
            self.admission.budget,
            total_bytes(self.cache.device),
            sum(device.values()) + self.admission.planned_bytes,
            pool_bytes(self.cache.device),
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
        arrival_s = self._now_s() - waited_s
        sequence = self._requests.take(
            request_id, list(prompt), sampling, emitted or [], adapter, cache_salt, tier, arrival_s
        )
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds; unknown ids are ignored."""
        sequence = self._requests.find(request_id)
        if sequence is not None:
            self.attainment.abort(sequence, self._now_s())
            self.scheduler.abort(sequence)
            self._requests.release(sequence)

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
        return self._jobs.can_add()

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
        job = self._jobs.add(job_id, config, method, training, validation, tenant, weight, checkpoint)
        self.scheduler.add_job(job)
        return job

    def remove_job(self, job_id: str) -> None:
        """Stops a job and frees what it holds; unknown ids are ignored."""
        job = self._jobs.find(job_id)
        if job is not None:
            self._stop(job)
            self._jobs.release(job_id)

    def _stop(self, job: FinetuneJob) -> None:
        """Schedules nothing more of it."""
        if job in self.scheduler.jobs:
            self.scheduler.remove_job(job)

    def job(self, job_id: str) -> FinetuneJob:
        return self._jobs.get(job_id)

    def checkpoint_job(self, job_id: str) -> dict[str, bytes]:
        """The job's state after its last optimizer step, as files."""
        self._end_update(job_id)
        return self._jobs.checkpoint(job_id)

    def export_job(self, job_id: str, base_model: str) -> dict[str, bytes]:
        """The job's adapter as PEFT's two files."""
        self._end_update(job_id)
        return self._jobs.export(job_id, base_model)

    def _end_update(self, job_id: str) -> None:
        """Finishes an optimizer step of which only some parts have moved; its report comes with the next `step`."""
        job = self._jobs.get(job_id)
        if job.updated_parts:
            self._enter(Batch(updates=[Update(job, job.updated_parts, job.num_update_parts)]))

    def trained_tokens(self, job_id: str) -> int:
        return self.runner.trainers[job_id].trained_tokens
