"""The GPU worker: takes requests and jobs from two queues, runs the engine's iterations, publishes results."""

from __future__ import annotations

import secrets
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import structlog

from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import IterationStats
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.inference import InferenceLink
from services.gpu_worker.ranks import open_engine
from services.gpu_worker.recorder import Recorder
from services.gpu_worker.store_client import StoreClient
from services.gpu_worker.training import TrainingLink
from shared.config import Settings
from shared.messages import TierAttainment, WorkerStatus
from shared.model_folder import describe_model
from shared.queue import FinetuneQueue, InferenceWorkerQueue, IterationSender, open_redis
from shared.storage import ObjectStore
from shared.telemetry import configure_logs

log = structlog.get_logger()
TAKE_S = 0.02  # while the engine is busy, new requests are looked for this often
IDLE_WAIT_S = 0.25


@dataclass(slots=True)
class Meter:
    """Tokens since the start, and per second since the last report."""

    inference: int = 0
    finetune: float = 0.0  # forward and backward done
    _reported: tuple[float, int, float] = field(default_factory=lambda: (time.monotonic(), 0, 0.0))

    def add(self, stats: IterationStats) -> None:
        self.inference += stats.num_decode_tokens + stats.num_prefill_tokens
        self.finetune += stats.num_backward_tokens

    def rates(self) -> tuple[float, float]:
        """Inference and finetuning tokens per second since the last call."""
        since, inference, finetune = self._reported
        self._reported = time.monotonic(), self.inference, self.finetune
        elapsed = max(self._reported[0] - since, 1e-9)
        return (self.inference - inference) / elapsed, (self.finetune - finetune) / elapsed


class Worker:
    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.worker_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._settings = settings
        self._engine = engine
        folder = describe_model(settings.model_dir)
        client = open_redis(settings.redis_url)
        requests = InferenceWorkerQueue(client, settings, self.worker_id)
        jobs = FinetuneQueue(client, settings, self.worker_id)
        self._store = StoreClient(settings, ObjectStore.from_settings(settings))
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="io")
        self._inference = InferenceLink(self._engine, settings, requests, self._store, self._pool)
        self._training = TrainingLink(
            self._engine, settings, jobs, self._store, self._pool, self.worker_id, folder.base_digest
        )
        self._meter = Meter()
        self._recorder = Recorder(IterationSender(client, self.worker_id))
        self._stopping = False
        self._started_s = time.monotonic()
        self._steps = 0
        self._beat_s = 0.0
        self._take_s = 0.0

    def run(self) -> None:
        """Until `stop`; then finishes what it can within the drain time and hands the rest back."""
        log.info("worker_ready", worker=self.worker_id, model=self._settings.model_id)
        self._recorder.start()
        while not self._stopping:
            self._turn(draining=False)
        deadline = time.monotonic() + self._settings.drain_s
        self._training.drain()
        while not self._inference.is_quiet and time.monotonic() < deadline:
            self._turn(draining=True)
        self._recorder.stop(timeout_s=1.0)
        self._inference.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._store.close()
        log.info("worker_stopped", worker=self.worker_id, steps=self._steps)

    def stop(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Usable as a signal handler."""
        self._stopping = True

    def _turn(self, draining: bool) -> None:
        """One iteration and what belongs around it."""
        self._beat(draining)
        if not draining:
            self._take()
        self._inference.advance()
        self._training.advance()
        if self._engine.has_work:
            self._step()
        elif draining or not (self._inference.is_quiet and self._training.is_quiet):
            time.sleep(0.005)  # somebody waits for a download or an answer
        else:
            self._inference.wait(min(IDLE_WAIT_S, self._settings.beat_s))

    def _take(self) -> None:
        now = time.monotonic()
        if self._engine.has_work and now - self._take_s < TAKE_S:
            return
        self._take_s = now
        self._inference.take()
        self._training.take()

    def _step(self) -> None:
        try:
            result = self._engine.step()
        except Exception:
            log.exception("step_failed", requests=self._inference.num_flights)
            raise
        self._steps += 1
        self._meter.add(result.stats)
        self._recorder.add(result.stats, len(self._engine.scheduler.jobs))
        self._inference.publish(result.tokens)
        self._training.handle(result.jobs)
        if result.stats.timing.total_ms == 0:
            time.sleep(0.002)  # jobs wait for memory that requests hold

    def _beat(self, draining: bool) -> None:
        now = time.monotonic()
        if now - self._beat_s < self._settings.beat_s:
            return
        self._beat_s = now
        inference, finetune = self._meter.rates()
        scheduler, memory = self._engine.scheduler, self._engine.memory()
        errors = scheduler.latency.errors()["iteration"]
        self._inference.beat(
            WorkerStatus(
                worker_id=self.worker_id,
                model=self._settings.model_id,
                draining=draining,
                uptime_s=now - self._started_s,
                engine_steps=self._steps,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                free_blocks=scheduler.blocks.num_free_blocks,
                total_blocks=scheduler.blocks.num_blocks,
                memory_bytes=memory.device,
                host_memory_bytes=memory.host,
                memory_limit_bytes=memory.limit,
                memory_statistics=memory.statistics,
                training_jobs=self._training.job_ids,
                finetune_tokens_per_s=finetune,
                inference_tokens_per_s=inference,
                finetune_tokens=self._meter.finetune,
                inference_tokens=self._meter.inference,
                latency_error_p50=errors.p50,
                latency_error_p95=errors.p95,
                latency_exceeded=errors.exceeded,
                service_levels=attainment_of(self._engine),
            )
        )


def attainment_of(engine: Engine) -> dict[str, TierAttainment]:
    return {
        tier: TierAttainment(
            ttft_slo_ms=counts.slo.ttft_ms,
            tpot_slo_ms=counts.slo.tpot_ms,
            ttft_met=counts.ttft_met,
            ttft_missed=counts.ttft_missed,
            ttft_ms_sum=counts.ttft_ms_sum,
            tpot_met=counts.tpot_met,
            tpot_missed=counts.tpot_missed,
            tpot_ms_sum=counts.tpot_ms_sum,
        )
        for tier, counts in engine.attainment.tiers.items()
    }


def engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        model_dir=settings.model_dir,
        device=settings.device,
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        kernels=settings.kernels,
        cuda_graphs=settings.cuda_graphs,
        lanes=settings.lanes,
        async_scheduling=settings.async_scheduling,
        backward_stream=settings.backward_stream,
        quantise=settings.quantise,
        profile_dir=Path(settings.profile_dir) if settings.profile_dir else None,
        int4_group_size=settings.int4_group_size,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_adapters=settings.max_adapters,
        max_lora_rank=settings.max_lora_rank,
        max_finetune_jobs=settings.max_finetune_jobs,
        finetune_tokens_in_flight=settings.finetune_tokens_in_flight,
        finetune_bytes=settings.finetune_bytes,
        activation_bytes=settings.activation_bytes,
        offload_activations=settings.offload_activations,
        slos={
            tier: SLO(level.tpot_ms, level.ttft_ms, rank)
            for rank, (tier, level) in enumerate(settings.service_levels.items())
        },
        scheduler=SchedulerConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            finetune_window=settings.finetune_window,
            sharing=settings.sharing,
            period=settings.sharing_period,
            idle_ms=idle_ms(settings),
        ),
    )


def idle_ms(settings: Settings) -> float:
    """How long an iteration may be when nobody waits: of the first token's time an arrival of the default tier
    loses at most a quarter to it, and one of the strictest half."""
    levels = settings.service_levels
    return min(levels["default"].ttft_ms / 4, levels["priority"].ttft_ms / 2)


def main() -> None:
    configure_logs()
    settings = Settings()
    with open_engine(engine_config(settings), settings.tensor_parallel) as engine:
        worker = Worker(settings, engine)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, worker.stop)
        worker.run()
