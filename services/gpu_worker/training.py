"""Connects the finetune queue and the adapter store to the engine: claim, beat, checkpoint, publish.

The engine's thread never waits for a network: calls run in a pool, and their results are looked at between
steps. Every call carries the job's fence, so that a worker that lost its lease changes nothing.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import structlog

from services.gpu_worker.engine.admission import JobMustWait
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.finetune.checkpoint import InvalidCheckpoint
from services.gpu_worker.finetune.reports import TrainingDiverged
from services.gpu_worker.job_claims import ClaimedJob, JobClaims
from services.gpu_worker.job_run import JobRun, failure_of
from services.gpu_worker.methods import job_config, method_of
from services.gpu_worker.model.peft import InvalidAdapter
from services.gpu_worker.store_client import StaleFence, StoreClient, StoreUnavailable, digest_of
from shared.config import Settings
from shared.messages import BeatRequest, ClaimRequest, EndJob
from shared.queue import FinetuneQueue

log = structlog.get_logger()


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
        self._store = store
        self._pool = pool
        self._base_digest = base_digest
        claim = ClaimRequest(worker_id=worker_id, base_model=settings.model_id, base_digest=base_digest)
        self._claims = JobClaims(jobs, store, pool, claim)
        self._runs: dict[str, JobRun] = {}

    @property
    def job_ids(self) -> tuple[str, ...]:
        return tuple(self._runs)

    @property
    def is_quiet(self) -> bool:
        return not self._runs and self._claims.is_quiet

    # --- between two steps

    def take(self) -> None:
        """Starts a job that has been claimed, or looks for one where there is room."""
        claimed = self._claims.take(self._engine.can_add_job)
        if claimed is not None:
            self._start(claimed)

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
                run.add_report(event.report, time.monotonic())
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

    def _start(self, claimed: ClaimedJob) -> None:
        lease, now = claimed.lease, time.monotonic()
        run = JobRun(lease, now, now, 0, last_step_s=now, saved_s=now)
        self._runs[lease.job_id] = run
        try:
            job = self._engine.add_job(
                lease.job_id,
                job_config(lease.spec),
                method_of(lease.spec.peft),
                claimed.training,
                claimed.validation,
                tenant=lease.tenant_id,
                weight=lease.tenant_weight,
                checkpoint=claimed.checkpoint,
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
        run.say(f"Training {how} of {job.total_steps} steps on {len(claimed.training)} examples")
        log.info("job_started", job=lease.job_id, fence=lease.fence, step=job.step, steps=job.total_steps)

    # --- beats

    def _check_beat(self, run: JobRun, now: float) -> None:
        if run.beating is not None:
            if run.beating.done():
                self._heed_beat(run)
            return
        if now - run.confirmed_s > run.lease.lease_s:
            log.error("lease_lost", job=run.lease.job_id)
            self._forget(run)
        elif now - run.beat_s >= self._settings.job_beat_s:
            request = self._beat_request(run, now)
            run.sent_beat(self._pool.submit(self._store.beat, run.lease.job_id, request), now)

    def _beat_request(self, run: JobRun, now: float) -> BeatRequest:
        job_id = run.lease.job_id
        return run.beat_request(self._engine.job(job_id), self._engine.trained_tokens(job_id), now)

    def _heed_beat(self, run: JobRun) -> None:
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

    def _checkpoint(self, run: JobRun) -> dict[str, bytes]:
        return self._engine.checkpoint_job(run.lease.job_id)

    def _save(self, run: JobRun, step: int, files: dict[str, bytes]) -> None:
        """In the pool."""
        checkpoint_id = f"ftckpt_{secrets.token_hex(12)}"
        self._store.commit_checkpoint(run.lease.job_id, run.lease.fence, checkpoint_id, step, files)

    def _check_save(self, run: JobRun, now: float) -> None:
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

    def _pause(self, run: JobRun) -> None:
        step, files = self._engine.job(run.lease.job_id).step, self._checkpoint(run)
        self._engine.remove_job(run.lease.job_id)

        def save_and_end() -> None:
            self._save(run, step, files)
            self._store.end(run.lease.job_id, EndJob(fence=run.lease.fence, outcome="paused"))

        run.ending = self._pool.submit(save_and_end)

    # --- ends

    def _publish(self, run: JobRun) -> None:
        """The adapter is on the device already: once the version is registered, requests find it loaded."""
        job_id, lease = run.lease.job_id, run.lease
        files = self._engine.export_job(job_id, lease.base_model)
        tokens = self._engine.trained_tokens(job_id)
        final = self._beat_request(run, time.monotonic())
        self._engine.remove_job(job_id)
        try:
            self._engine.load_adapter(digest_of(files), files)  # the load test: names, shapes, finite values
        except InvalidAdapter as error:
            self._end(run, failure_of(lease, "invalid_weights", str(error)))
            return
        except ValueError as error:
            log.warning("adapter_not_resident", job=job_id, error=str(error))  # loaded at its first request

        def report_and_publish() -> object:
            try:
                self._store.beat(job_id, final)
            except StoreUnavailable as error:
                log.warning("job_beat_failed", job=job_id, error=str(error))
            return self._store.publish(lease, files, self._base_digest, tokens, run.final_metrics())

        run.on_ended = lambda reply: log.info("job_published", job=job_id, model=reply.model)
        run.ending = self._pool.submit(report_and_publish)

    def _fail(self, run: JobRun, error: Exception) -> None:
        job_id = run.lease.job_id
        code = "training_diverged" if isinstance(error, TrainingDiverged) else "training_failed"
        if "out of memory" in str(error).lower():
            code = "out_of_memory"
        log.error("job_failed", job=job_id, code=code, error=str(error))
        self._engine.remove_job(job_id)
        self._end(run, failure_of(run.lease, code, str(error)))

    def _end(self, run: JobRun, message: EndJob) -> None:
        run.ending = self._pool.submit(self._store.end, run.lease.job_id, message)

    def _check_end(self, run: JobRun) -> None:
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

    def _forget(self, run: JobRun) -> None:
        self._runs.pop(run.lease.job_id, None)
        self._engine.remove_job(run.lease.job_id)
