"""`Engine.step` is the whole system: schedule, run, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from functools import partial

import torch

from services.gpu_worker.compiler.layout import choose_layout
from services.gpu_worker.engine.attainment import Attainment
from services.gpu_worker.engine.batch import Batch, Timing, Update
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.config import EngineConfig, device_of, is_asynchronous
from services.gpu_worker.engine.events import IterationStats, JobEvent, StepResult, TokenEvent
from services.gpu_worker.engine.in_flight import InFlight, Launched, RunResult
from services.gpu_worker.engine.jobs import Jobs
from services.gpu_worker.engine.latency import Work
from services.gpu_worker.engine.memory import free_bytes
from services.gpu_worker.engine.memory_account import MemoryAccount, account_of, restart_peak
from services.gpu_worker.engine.memory_watch import MemoryWatch
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.requests import InvalidRequest, Requests
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER
from services.gpu_worker.engine.startup import (
    make_admission,
    make_cache,
    make_lanes,
    make_model,
    make_scheduler,
    record_decodes,
)
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.parallel import ALONE, Group
from services.gpu_worker.model.peft import Method
from services.gpu_worker.model.peft_files import read_peft
from services.gpu_worker.model.weights import ModelWeights


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
        self.scheduler = make_scheduler(config, self.runner, self.blocks, self.max_model_len, policies)
        slack_ms = self.scheduler.slack_beside_decodes_ms(config.slos[DEFAULT_TIER].tpot_ms)
        self.admission.set_pace(policies, self.scheduler.latency, config.scheduler.min_window, slack_ms)
        self._watch = MemoryWatch(
            self.model.weights, self.scheduler, self.runner.trainers, self.admission.can_move
        )
        self.attainment = Attainment(config.slos)
        self._requests = Requests(
            config.slos, self.adapters, self.model.config.vocab_size, self.max_model_len
        )
        self._jobs = Jobs(self.runner, self.admission, config.max_finetune_jobs, config.max_lora_rank)
        self._launched: deque[Launched] = deque()  # not settled yet, the oldest first
        restart_peak(device)  # loading the model and measuring it is over

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

    def _launch(self) -> Launched:
        batch = self.scheduler.schedule(self._next_begin_s())
        return self._enter(batch)

    def _enter(self, batch: Batch) -> Launched:
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
        launched = Launched(batch, flight, ends_s, self._jobs.all(), finished)
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

    def _settle(self, launched: Launched, result: StepResult) -> None:
        """Takes what an iteration has found into the result."""
        found = self._collect(launched.flight) if launched.flight else RunResult()
        if self._launched:  # begins now, whatever was predicted of this one
            self._launched[0].ends_s = self._now_s() + self._launched[0].batch.predicted_ms / 1000
        for item in self.scheduler.receive(found.sampled, self._now_s()):
            if item.finish is not None:
                self.attainment.finish(item.sequence, self._now_s())
                self._requests.release(item.sequence)
            result.tokens.append(TokenEvent.of(item))
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
            steps = [step.work for step in batch.steps if step.lane == lane]
            forward = Work() if lane else batch.forward_work
            latency.observe(forward, times.forward_ms, steps, times.steps_ms)
        share = sum((update.share for update in batch.updates), 0.0)
        if share:
            self.scheduler.latency.observe_update(timing.optimizer_ms / share)

    def _job_events(self, launched: Launched, found: RunResult) -> list[JobEvent]:
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
        return IterationStats.of(batch, timing, self.scheduler)

    def memory(self) -> MemoryAccount:
        """What everybody holds now, from the tensors that are there."""
        return account_of(self.runner, self.admission)

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
