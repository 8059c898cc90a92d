"""Files, jobs, events and checkpoints as JSON."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from shared.jobs import public_status
from shared.models import Checkpoint, File, FtEvent, FtJob

CHECKPOINT_METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)


def page(items: list[dict[str, Any]], has_more: bool, *, with_ends: bool = False) -> dict[str, Any]:
    body: dict[str, Any] = {"object": "list", "data": items, "has_more": has_more}
    if with_ends:
        body |= {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
    return body


def seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": seconds(file.created_at),
        "expires_at": seconds(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }


def job_object(job: FtJob, org: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": seconds(job.created_at),
        "model": job.base_model,
        "status": public_status(job),
        "error": job_error(job),
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": seconds(job.finished_at),
        "estimated_finish": estimated_finish(job),
        "organization_id": org,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "trained_tokens": job.trained_tokens if job.status == "succeeded" else None,
        "hyperparameters": job.hyperparameters,
        "method": job.method,
        "seed": job.spec["seed"],
        "integrations": job.integrations or [],
        "metadata": job.metadata_,
        "flexllm": job.extension,
    }


def job_error(job: FtJob) -> dict[str, str | None] | None:
    if job.error_code is None:
        return None
    return {"code": job.error_code, "message": job.error_message, "param": job.error_param}


def estimated_finish(job: FtJob) -> int | None:
    if job.status != "running" or job.eta_s is None:
        return None
    return seconds(job.updated_at + timedelta(seconds=job.eta_s))


def event_object(event: FtEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": seconds(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def checkpoint_object(checkpoint: Checkpoint, job: FtJob) -> dict[str, Any]:
    """Checkpoints resume jobs and are not served; the name says which one is meant."""
    metrics = checkpoint.metrics or {}
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(checkpoint.created_at),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"ft:{job.base_model}:{job.adapter_name}:ckpt-step-{checkpoint.step}",
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step}
        | {name: metrics[name] for name in CHECKPOINT_METRICS if metrics.get(name) is not None},
    }
