"""A job at an optimizer-step boundary as named files, and back. No pickle: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from services.gpu_worker.finetune.trainer import Trainer

FILES = ("optimizer.safetensors", "state.json")


class InvalidCheckpoint(ValueError):
    """The checkpoint belongs to another job, or its files are damaged."""


def save_checkpoint(trainer: Trainer) -> dict[str, bytes]:
    """Masters and moments, and where the job stands. The order of examples follows from (seed, step)."""
    job = trainer.job
    state = {
        "job_id": job.job_id,
        "step": job.step,
        "evaluated_step": job.evaluated_step,
        "trained_tokens": trainer.trained_tokens,
        "skipped_steps": trainer.steps.num_skipped,
        "config": asdict(job.config),
        "torch": torch.__version__,
    }
    return {
        "optimizer.safetensors": save_safetensors(trainer.parameters.state()),
        "state.json": json.dumps(state, sort_keys=True).encode(),
    }


def load_checkpoint(trainer: Trainer, files: Mapping[str, bytes]) -> None:
    """Puts a fresh trainer of the same job where `save_checkpoint` found it."""
    job = trainer.job
    try:
        state = json.loads(files["state.json"])
        tensors = load_safetensors(files["optimizer.safetensors"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise InvalidCheckpoint(
            f"job {job.job_id}: one of {', '.join(FILES)} is unreadable: {error}"
        ) from error
    if state["job_id"] != job.job_id:
        raise InvalidCheckpoint(f"checkpoint of job {state['job_id']}, not of {job.job_id}")
    if state["config"] != asdict(job.config):
        raise InvalidCheckpoint(f"job {job.job_id}: the hyper-parameters differ from the checkpoint's")
    try:
        trainer.parameters.load_state(tensors)
    except ValueError as error:
        raise InvalidCheckpoint(f"job {job.job_id}: {error}") from error
    trainer.trained_tokens, trainer.steps.num_skipped = state["trained_tokens"], state["skipped_steps"]
    job.resume(state["step"], state["evaluated_step"])
