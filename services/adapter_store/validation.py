"""A job from `validating_files` to `queued`, or to `failed` with the lines that are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import structlog
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.adapter_store.dataset import Report, Rules, validate_file
from shared.config import Settings
from shared.db import SessionFactory
from shared.errors import NotFoundError
from shared.files import get_file
from shared.job_state import add_event, end_job, enqueue, lock_job
from shared.messages import TrainSpec
from shared.model_folder import ModelFolder, describe_model, read_chat_template
from shared.models import BaseModelRow, FtJob
from shared.storage import ObjectMissingError, ObjectStore
from shared.tokenizer import ChatTokenizer

PARAMS = ("training_file", "validation_file")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the job fails."""

    code: str
    message: str
    param: str | None = None
    report: Report | None = None


@cache
def load_tokenizer(model_dir: Path) -> ChatTokenizer:
    """Once a process: reading a vocabulary takes longer than checking a small file."""
    return ChatTokenizer(model_dir)


async def validate_job(factory: SessionFactory, store: ObjectStore, settings: Settings, job_id: str) -> None:
    """Reads the job's files and moves it on; a job that was cancelled meanwhile stays cancelled."""
    async with factory.begin() as session:
        job = await session.get(FtJob, job_id)
        if job is None or job.status != "validating_files":
            return
    reports: dict[str, Report] = {}
    problem = await check_files(factory, store, settings, job, reports)
    model = describe_model(settings.model_dir)
    async with factory.begin() as session:
        job = await lock_job(session, job_id)
        if job.status != "validating_files":
            return
        job.report = {param: report.summary() for param, report in reports.items()}
        if problem is None:
            await accept(session, job, model, reports)
        else:
            data = problem.report.summary() if problem.report else None
            await end_job(
                session, job, "failed", problem.message, code=problem.code, param=problem.param, data=data
            )
    log.info("job_validated", job=job_id, problem=problem.code if problem else None)


async def check_files(
    factory: SessionFactory, store: ObjectStore, settings: Settings, job: FtJob, reports: dict[str, Report]
) -> Problem | None:
    """Fills `reports`; returns the first thing that makes the job impossible."""
    if job.base_model != settings.model_id:
        return Problem("model_not_found", f"the base model {job.base_model!r} is not served here", "model")
    spec = TrainSpec.model_validate(job.spec)
    has_tools = "tool" in (read_chat_template(settings.model_dir) or "")
    for param in PARAMS:
        file_id = getattr(job, param)
        if file_id is None:
            continue
        minimum = settings.min_training_examples if param == "training_file" else 1
        rules = Rules(spec.max_seq_len, minimum, has_tools)
        try:
            async with factory.begin() as session:
                file = await get_file(session, job.tenant_id, file_id)
            tokenizer = load_tokenizer(settings.model_dir)
            report = await validate_file(store, file.storage_key, tokenizer, rules, settings.spool_dir)
        except (NotFoundError, ObjectMissingError):
            return Problem("file_not_found", f"the file {file_id} was deleted or has expired", param)
        reports[param] = report
        if report.dataset is None:
            return Problem(f"invalid_{param}", f"The {param} is invalid: {report.words()}", param, report)
    return None


async def accept(session: AsyncSession, job: FtJob, model: ModelFolder, reports: dict[str, Report]) -> None:
    job.base_digest = await register_base_model(session, job.base_model, model)
    for param, report in reports.items():
        if report.dataset is not None:
            setattr(job, param.replace("file", "data"), report.dataset.model_dump())
        add_event(
            session,
            job,
            f"Validated {param}: {report.num_examples} examples, {report.num_tokens} tokens, "
            f"{report.num_trained_tokens} of them trained on.",
            data=report.summary(),
        )
    enqueue(session, job)
    add_event(session, job, "Files validated, moving job to queued state")


async def register_base_model(session: AsyncSession, name: str, model: ModelFolder) -> str:
    """The digest under which versions name their base."""
    row = insert(BaseModelRow).values(
        digest=model.base_digest,
        name=name,
        tokenizer_digest=model.tokenizer_digest,
        chat_template=read_chat_template(model.path),
        source=model.source,
    )
    await session.execute(row.on_conflict_do_nothing())
    return model.base_digest
