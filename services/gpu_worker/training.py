"""Connects the finetune queue and the adapter store to the engine: claim, beat, checkpoint, publish.

The engine's thread never waits for a network: calls run in a pool, and their results are looked at between
steps. Every call carries the job's fence, so that a worker that lost its lease changes nothing.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import redis
import structlog

from services.gpu_worker.engine.admission import JobMustWait
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.finetune.checkpoint import InvalidCheckpoint
from services.gpu_worker.finetune.dataset import Dataset, InvalidDataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.reports import StepReport, TrainingDiverged
from services.gpu_worker.methods import method_of
from services.gpu_worker.model.peft import InvalidAdapter
from services.gpu_worker.store_client import (
    CorruptObject,
    StaleFence,
    StoreClient,
    StoreUnavailable,
    digest_of,
)
from shared.config import Settings
from shared.messages import (
    BeatReply,
    BeatRequest,
    ClaimRequest,
    EndJob,
    JobLease,
    JobMessage,
    StepMetrics,
    TrainSpec,
)
from shared.peft import LoraSpec
from shared.queue import FinetuneQueue

log = structlog.get_logger()
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Prepared:
    """A claimed job with its data in memory."""

    lease: JobLease
    training: Dataset
    validation: Dataset | None
    checkpoint: dict[str, bytes] | None


@dataclass(slots=True, eq=False)
class Run:
    """One job in our hands."""

    lease: JobLease
    confirmed_s: float  # monotonic time of the last good beat
    started_s: float
    first_step: int
    metrics: list[StepMetrics] = field(default_factory=list)
    messages: list[JobMessage] = field(default_factory=list)
    last_step_s: float = 0.0
    last_valid: StepReport | None = None
    first_valid: StepReport | None = None
    last_train: StepReport | None = None
    trained_at: float | None = None  # unix time of the last optimizer step, for people
    saved_step: int = 0
    saved_s: float = 0.0
    beat_s: float = 0.0
    beating: Future[BeatReply] | None = None
    saving: Future[None] | None = None
    ending: Future[Any] | None = None  # publish, or end: nothing else is sent any more
    on_ended: Callable[[Any], None] | None = None


class TrainingLink:
    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        jobs: FinetuneQueue,
        store: StoreClient,
        pool: ThreadPoolExecutor,
        worker_id: str,
        base_digest: str,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._jobs = jobs
        self._store = store
        self._pool = pool
        self._me = ClaimRequest(worker_id=worker_id, base_model=settings.model_id, base_digest=base_digest)
        self._runs: dict[str, Run] = {}
        self._claiming: tuple[str, Future[Prepared | None]] | None = None
        self._next_poll_s = 0.0

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._runs)

    @property
    def is_quiet(self) -> bool:
        return not self._runs and self._claiming is None

    # --- between two steps

    def take(self) -> None:
        """Looks for a job where there is room for one; at most twice a second, one claim at a time."""
        now = time.monotonic()
        if self._claiming is not None:
            self._finish_claim()
        elif now >= self._next_poll_s and self._engine.can_add_job():
            self._next_poll_s = now + POLL_S
            try:
                entry = self._jobs.take()
            except redis.RedisError as error:
                log.warning("finetune_take_failed", error=str(error))
                return
            if entry is not None:
                self._claiming = entry[0], self._pool.submit(self._prepare, entry[1])

    def advance(self) -> None:
        """Beats, checkpoints and ends that are due or done."""
        now = time.monotonic()
        for run in list(self._runs.values()):
            if run.ending is not None:
                self._check_end(run)
                continue
            self._check_beat(run, now)
            self._check_save(run, now)

    def handle(self, events: list[JobEvent]) -> None:
        """What the engine's last step meant for jobs."""
        for event in events:
            run = self._runs.get(event.job_id)
            if run is None or run.ending is not None:
                continue
            if event.report is not None:
                self._report(run, event.report)
            elif event.error is not None:
                self._fail(run, event.error)
            elif event.finished:
                self._publish(run)

    def drain(self) -> None:
        """Saves every job and hands it back, waiting for the answers."""
        for run in list(self._runs.values()):
            if run.ending is not None:
                continue
            try:
                if run.saving is not None:
                    run.saving.result(timeout=30)
                step, files = self._engine.job(run.lease.job_id).step, self._checkpoint(run)
                self._save(run, step, files)
                self._store.end(run.lease.job_id, EndJob(fence=run.lease.fence, outcome="released"))
            except (StaleFence, StoreUnavailable, TimeoutError) as error:
                log.warning("release_failed", job=run.lease.job_id, error=str(error))
            self._forget(run)

    # --- claims

    def _prepare(self, job_id: str) -> Prepared | None:
        """In the pool: claims the job and fetches what it needs; a job whose data is damaged fails here."""
        lease = self._store.claim(job_id, self._me)
        if lease is None:
            return None
        try:
            training = Dataset.from_bytes(self._store.read_object(lease.training.key, lease.training.sha256))
            validation = None
            if lease.validation is not None:
                data = self._store.read_object(lease.validation.key, lease.validation.sha256)
                validation = Dataset.from_bytes(data)
        except (CorruptObject, InvalidDataset) as error:
            self._store.end(job_id, _failure(lease, "dataset_read_error", str(error)))
            return None
        return Prepared(lease, training, validation, self._newest_checkpoint(lease))

    def _newest_checkpoint(self, lease: JobLease) -> dict[str, bytes] | None:
        """Of the committed checkpoints the newest that is whole."""
        for reference in lease.checkpoints:
            try:
                return self._store.read_checkpoint(reference)
            except CorruptObject as error:
                log.error("checkpoint_corrupt", job=lease.job_id, step=reference.step, error=str(error))
        return None

    def _finish_claim(self) -> None:
        assert self._claiming is not None
        entry_id, future = self._claiming
        if not future.done():
            return
        self._claiming = None
        try:
            prepared = future.result()
            self._jobs.ack(entry_id)
        except (StoreUnavailable, StaleFence, redis.RedisError) as error:
            log.warning("claim_failed", error=str(error))  # the entry comes again after its lease
            return
        if prepared is not None:
            self._start(prepared)

    def _start(self, prepared: Prepared) -> None:
        lease, now = prepared.lease, time.monotonic()
        run = Run(lease, now, now, 0, last_step_s=now, saved_s=now)
        self._runs[lease.job_id] = run
        try:
            job = self._engine.add_job(
                lease.job_id,
                job_config(lease.spec),
                method_of(lease.spec.peft),
                prepared.training,
                prepared.validation,
                tenant=lease.tenant_id,
                weight=lease.tenant_weight,
                checkpoint=prepared.checkpoint,
            )
        except JobMustWait as error:
            log.info("job_handed_back", job=lease.job_id, reason=str(error))
            self._end(run, EndJob(fence=lease.fence, outcome="released"))
            return
        except (InvalidAdapter, InvalidCheckpoint, ValueError) as error:
            self._fail(run, error)
            return
        run.first_step = run.saved_step = job.step
        how = f"resumed after step {job.step}" if job.step else "started"
        self._say(run, f"Training {how} of {job.total_steps} steps on {len(prepared.training)} examples")
        log.info("job_started", job=lease.job_id, fence=lease.fence, step=job.step, steps=job.total_steps)

    # --- reports and beats

    def _say(self, run: Run, message: str) -> None:
        run.messages.append(JobMessage(message=message))

    def _report(self, run: Run, report: StepReport) -> None:
        now = time.monotonic()
        speed = None
        if report.train_loss is not None:
            run.last_train, run.trained_at = report, time.time()
            speed = report.num_tokens / max(now - run.last_step_s, 1e-9)
            run.last_step_s = now
            if report.grad_norm is None:
                self._say(run, f"Step {report.step} skipped: the gradient was not finite")
        else:
            run.last_valid, run.first_valid = report, run.first_valid or report
        run.metrics.append(step_metrics(report, speed))

    def _check_beat(self, run: Run, now: float) -> None:
        if run.beating is not None:
            if run.beating.done():
                self._heed_beat(run)
            return
        if now - run.confirmed_s > run.lease.lease_s:
            log.error("lease_lost", job=run.lease.job_id)
            self._forget(run)
        elif now - run.beat_s >= self._settings.job_beat_s:
            run.beat_s = now
            run.beating = self._pool.submit(self._store.beat, run.lease.job_id, self._beat_request(run, now))
            run.metrics, run.messages = [], []

    def _beat_request(self, run: Run, now: float) -> BeatRequest:
        job = self._engine.job(run.lease.job_id)
        done = job.step - run.first_step
        remaining = job.total_steps - job.step
        return BeatRequest(
            fence=run.lease.fence,
            step=job.step,
            total_steps=job.total_steps,
            trained_tokens=self._engine.trained_tokens(run.lease.job_id),
            eta_s=(now - run.started_s) / done * remaining if done else None,
            metrics=tuple(run.metrics),
            messages=tuple(run.messages),
        )

    def _heed_beat(self, run: Run) -> None:
        future, run.beating = run.beating, None
        assert future is not None
        try:
            reply = future.result()
        except StaleFence:
            log.warning("job_taken_away", job=run.lease.job_id)
            self._forget(run)
            return
        except StoreUnavailable as error:
            log.warning("job_beat_failed", job=run.lease.job_id, error=str(error))
            return
        run.confirmed_s = run.beat_s
        if reply.cancel_requested:
            self._engine.remove_job(run.lease.job_id)
            self._end(run, EndJob(fence=run.lease.fence, outcome="cancelled"))
        elif reply.pause_requested:
            self._pause(run)

    # --- checkpoints

    def _checkpoint(self, run: Run) -> dict[str, bytes]:
        return self._engine.checkpoint_job(run.lease.job_id)

    def _save(self, run: Run, step: int, files: dict[str, bytes]) -> None:
        """In the pool."""
        checkpoint_id = f"ftckpt_{secrets.token_hex(12)}"
        self._store.commit_checkpoint(run.lease.job_id, run.lease.fence, checkpoint_id, step, files)

    def _check_save(self, run: Run, now: float) -> None:
        if run.lease.job_id not in self._runs or run.ending is not None:
            return
        if run.saving is not None:
            if run.saving.done():
                failure, run.saving = run.saving.exception(), None
                if failure is not None:
                    log.warning("checkpoint_failed", job=run.lease.job_id, error=str(failure))
            return
        step = self._engine.job(run.lease.job_id).step
        due = step - run.saved_step >= self._settings.checkpoint_every_steps
        due = due or now - run.saved_s >= self._settings.checkpoint_every_s
        if due and step > run.saved_step:
            run.saved_step, run.saved_s = step, now
            run.saving = self._pool.submit(self._save, run, step, self._checkpoint(run))

    def _pause(self, run: Run) -> None:
        step, files = self._engine.job(run.lease.job_id).step, self._checkpoint(run)
        self._engine.remove_job(run.lease.job_id)

        def save_and_end() -> None:
            self._save(run, step, files)
            self._store.end(run.lease.job_id, EndJob(fence=run.lease.fence, outcome="paused"))

        run.ending = self._pool.submit(save_and_end)

    # --- ends

    def _publish(self, run: Run) -> None:
        """The adapter is on the device already: once the version is registered, requests find it loaded."""
        job_id, lease = run.lease.job_id, run.lease
        files = self._engine.export_job(job_id, lease.base_model)
        tokens = self._engine.trained_tokens(job_id)
        final = self._beat_request(run, time.monotonic())
        self._engine.remove_job(job_id)
        try:
            self._engine.load_adapter(digest_of(files), files)  # the load test: names, shapes, finite values
        except InvalidAdapter as error:
            self._end(run, _failure(lease, "invalid_weights", str(error)))
            return
        except ValueError as error:
            log.warning("adapter_not_resident", job=job_id, error=str(error))  # loaded at its first request

        def report_and_publish() -> object:
            try:
                self._store.beat(job_id, final)
            except StoreUnavailable as error:
                log.warning("job_beat_failed", job=job_id, error=str(error))
            return self._store.publish(lease, files, self._me.base_digest, tokens, final_metrics(run))

        run.on_ended = lambda reply: log.info("job_published", job=job_id, model=reply.model)
        run.ending = self._pool.submit(report_and_publish)

    def _fail(self, run: Run, error: Exception) -> None:
        job_id = run.lease.job_id
        code = "training_diverged" if isinstance(error, TrainingDiverged) else "training_failed"
        if "out of memory" in str(error).lower():
            code = "out_of_memory"
        log.error("job_failed", job=job_id, code=code, error=str(error))
        self._engine.remove_job(job_id)
        self._end(run, _failure(run.lease, code, str(error)))

    def _end(self, run: Run, message: EndJob) -> None:
        run.ending = self._pool.submit(self._store.end, run.lease.job_id, message)

    def _check_end(self, run: Run) -> None:
        assert run.ending is not None
        if not run.ending.done():
            return
        try:
            reply = run.ending.result()
        except (StaleFence, StoreUnavailable) as error:
            log.error("job_end_failed", job=run.lease.job_id, error=str(error))  # its lease ends by itself
        else:
            if run.on_ended is not None:
                run.on_ended(reply)
        self._forget(run)

    def _forget(self, run: Run) -> None:
        self._runs.pop(run.lease.job_id, None)
        self._engine.remove_job(run.lease.job_id)


def job_config(spec: TrainSpec) -> JobConfig:
    return JobConfig(
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_schedule=spec.lr_schedule,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        beta1=spec.beta1,
        beta2=spec.beta2,
        epsilon=spec.epsilon,
        max_grad_norm=spec.max_grad_norm,
        lora_dropout=spec.peft.dropout if isinstance(spec.peft, LoraSpec) else 0.0,
        seed=spec.seed,
        eval_every_steps=spec.eval_every_steps,
        max_steps=spec.max_steps,
    )


def step_metrics(report: StepReport, tokens_per_s: float | None) -> StepMetrics:
    """JSON has no NaN: a loss that is not finite is left out."""
    return StepMetrics(
        step=report.step,
        train_loss=_finite(report.train_loss),
        train_mean_token_accuracy=_finite(report.train_accuracy),
        valid_loss=_finite(report.valid_loss),
        valid_mean_token_accuracy=_finite(report.valid_accuracy),
        learning_rate=report.learning_rate,
        grad_norm=_finite(report.grad_norm),
        num_tokens=report.num_tokens,
        tokens_per_s=tokens_per_s,
    )


def final_metrics(run: Run) -> dict[str, float]:
    """What a version says of its training."""
    train, valid, first = run.last_train, run.last_valid, run.first_valid
    found = {
        "train_loss": train.train_loss if train else None,
        "train_mean_token_accuracy": train.train_accuracy if train else None,
        "valid_loss": valid.valid_loss if valid else None,
        "valid_mean_token_accuracy": valid.valid_accuracy if valid else None,
        "base_valid_loss": first.valid_loss if first and first.step == 0 else None,
        "trained_at": run.trained_at,
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _failure(lease: JobLease, code: str, message: str) -> EndJob:
    return EndJob(fence=lease.fence, outcome="failed", code=code, message=message[:2000])
