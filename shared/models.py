"""The system of record: every table, once.

All ids are text. Times are the database's (`clock_timestamp`), never a process's. Rows that a customer owns
carry `tenant_id`; the migration puts row level security on each such table.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

JOB_STATUSES = (
    "validating_files",
    "queued",
    "running",
    "publishing",
    "paused",
    "succeeded",
    "failed",
    "cancelled",
)
TERMINAL_STATUSES = ("succeeded", "failed", "cancelled")
VERSION_STATES = ("PENDING", "READY", "FAILED", "RETIRED")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: Text,
        int: BigInteger,
        float: Double,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text),
    }
    __mapper_args__: Any = {"eager_defaults": True}  # noqa: RUF012 - server-made values come back with the write


Id = Annotated[str, mapped_column(primary_key=True)]
Seq = Annotated[int, mapped_column(BigInteger, Identity(always=True), primary_key=True)]
Order = Annotated[int, mapped_column(BigInteger, Identity(always=True), unique=True)]  # the order of pages
TenantId = Annotated[str, mapped_column(ForeignKey("tenant.id"), index=True)]
Created = Annotated[datetime, mapped_column(server_default=func.clock_timestamp())]
Zero = Annotated[int, mapped_column(server_default=text("0"))]
No = Annotated[bool, mapped_column(server_default=text("false"))]


def one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Tenant(Base):
    __tablename__ = "tenant"
    __table_args__ = (
        CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,38}$'", name="slug"),
        CheckConstraint("weight > 0", name="weight"),
    )

    id: Mapped[Id]
    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)  # the organisation in model names
    weight: Mapped[float] = mapped_column(server_default=text("1"))  # share of training capacity
    created_at: Mapped[Created]


class ApiKey(Base):
    """Only the keyed hash is stored; the key itself is shown once."""

    __tablename__ = "api_key"

    id: Mapped[Id]
    tenant_id: Mapped[TenantId]
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    key_hash: Mapped[str]
    scopes: Mapped[list[str]]
    created_at: Mapped[Created]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class File(Base):
    """An upload or a result. Its bytes lie under `storage_key`."""

    __tablename__ = "file"
    __table_args__ = (one_of("status", ("uploaded", "processed", "error")),)

    id: Mapped[Id]
    seq: Mapped[Order]
    tenant_id: Mapped[TenantId]
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    storage_key: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="processed")
    status_details: Mapped[str | None]
    created_at: Mapped[Created]
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class BaseModelRow(Base):
    """A backbone that jobs were trained against, told apart by content, not by name."""

    __tablename__ = "base_model"

    digest: Mapped[Id]
    name: Mapped[str]
    tokenizer_digest: Mapped[str]
    chat_template: Mapped[str | None]
    source: Mapped[str | None]
    created_at: Mapped[Created]


class FtTransition(Base):
    """The legal moves of a job; the guard trigger refuses any other."""

    __tablename__ = "ft_transition"

    src: Mapped[Id]
    dst: Mapped[Id]


class FtJob(Base):
    """A finetuning job: what was asked, where it stands, and who may move it (`fence`, `lease_until`)."""

    __tablename__ = "ft_job"
    __table_args__ = (
        one_of("status", JOB_STATUSES),
        CheckConstraint("(status IN ('running', 'publishing')) = (worker_id IS NOT NULL)", name="worker"),
        CheckConstraint("(status = 'succeeded') = (result_version IS NOT NULL)", name="result"),
        Index("ix_ft_job_ready", "priority", "next_run_at", postgresql_where=text("status = 'queued'")),
        Index(
            "ix_ft_job_leased",
            "lease_until",
            postgresql_where=text("status IN ('running', 'publishing')"),
        ),
        Index("ix_ft_job_request", "tenant_id", "request_hash", "created_at"),
    )

    id: Mapped[Id]
    seq: Mapped[Order]
    tenant_id: Mapped[TenantId]
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_key.id"))

    # As the customer asked
    base_model: Mapped[str]
    training_file: Mapped[str] = mapped_column(ForeignKey("file.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("file.id"))
    suffix: Mapped[str | None]
    method: Mapped[dict[str, Any] | None]
    hyperparameters: Mapped[dict[str, Any]]
    integrations: Mapped[list[Any] | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    extension: Mapped[dict[str, Any] | None]  # the `flexllm` object of the request
    request_hash: Mapped[str]
    promote: Mapped[No]  # move the adapter's `live` alias on success

    # As decided from it
    adapter_name: Mapped[str]
    spec: Mapped[dict[str, Any]]  # shared.messages.TrainSpec
    priority: Mapped[Zero]
    base_digest: Mapped[str | None] = mapped_column(ForeignKey("base_model.digest"))
    training_data: Mapped[dict[str, Any] | None]  # shared.messages.DatasetRef
    validation_data: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]  # of the validation

    # Who may move it
    status: Mapped[str] = mapped_column(server_default="validating_files")
    fence: Mapped[Zero]
    worker_id: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    attempt: Mapped[Zero]
    no_progress: Mapped[Zero]  # claims in a row that ended without progress
    claimed_step: Mapped[Zero]  # `furthest_step` when last claimed
    next_run_at: Mapped[Created]
    sent_at: Mapped[datetime | None]  # when its id last went to the finetune queue
    cancel_requested: Mapped[No]
    pause_requested: Mapped[No]

    # How far it is
    step: Mapped[Zero]  # of this attempt
    furthest_step: Mapped[Zero]  # over all attempts
    total_steps: Mapped[Zero]
    trained_tokens: Mapped[Zero]
    eta_s: Mapped[float | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    result_version: Mapped[str | None] = mapped_column(
        ForeignKey("adapter_version.id", use_alter=True, name="fk_ft_job_result_version_adapter_version")
    )
    fine_tuned_model: Mapped[str | None]  # the version's own name
    result_file: Mapped[str | None] = mapped_column(ForeignKey("file.id"))
    created_at: Mapped[Created]
    updated_at: Mapped[Created]
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class FtEvent(Base):
    """What a customer reads about a job, in the order of `seq`."""

    __tablename__ = "ft_event"
    __table_args__ = (
        one_of("level", ("info", "warn", "error")),
        one_of("type", ("message", "metrics")),
        Index("ix_ft_event_job", "job_id", "seq"),
    )

    id: Mapped[Id]
    seq: Mapped[Order]
    tenant_id: Mapped[TenantId]
    job_id: Mapped[str] = mapped_column(ForeignKey("ft_job.id"))
    level: Mapped[str] = mapped_column(server_default="info")
    type: Mapped[str] = mapped_column(server_default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    created_at: Mapped[Created]


class FtMetric(Base):
    """One row a step; a step trained again after a resume replaces its row."""

    __tablename__ = "ft_metric"

    job_id: Mapped[str] = mapped_column(ForeignKey("ft_job.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[TenantId]
    train_loss: Mapped[float | None]
    train_mean_token_accuracy: Mapped[float | None]
    valid_loss: Mapped[float | None]
    valid_mean_token_accuracy: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    num_tokens: Mapped[int | None]
    tokens_per_s: Mapped[float | None]
    created_at: Mapped[Created]


class Checkpoint(Base):
    """Committed: every file was in object storage before the row. `expired_at`: its files may be gone."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("job_id", "step", "fence"),)

    id: Mapped[Id]
    seq: Mapped[Order]
    tenant_id: Mapped[TenantId]
    job_id: Mapped[str] = mapped_column(ForeignKey("ft_job.id"))
    fence: Mapped[int]
    step: Mapped[int]
    manifest_key: Mapped[str]
    manifest_sha256: Mapped[str]
    metrics: Mapped[dict[str, Any] | None]
    created_at: Mapped[Created]
    expired_at: Mapped[datetime | None]


class Adapter(Base):
    """A name that versions and aliases belong to."""

    __tablename__ = "adapter"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        CheckConstraint(r"name ~ '^[a-z0-9][a-z0-9._-]{0,62}$' AND name !~ '\.\.'", name="name"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[TenantId]
    name: Mapped[str]
    created_at: Mapped[Created]


class AdapterVersion(Base):
    """Immutable but for its state. Its files lie under `adapter_prefix(digest)`."""

    __tablename__ = "adapter_version"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        UniqueConstraint("tenant_id", "model_name"),
        one_of("state", VERSION_STATES),
        CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name="digest"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[TenantId]
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"))
    version: Mapped[int]
    state: Mapped[str]
    model_name: Mapped[str]
    digest: Mapped[str] = mapped_column(index=True)
    files: Mapped[dict[str, Any]]  # name -> sha256
    size_bytes: Mapped[int]
    base_model: Mapped[str]
    base_digest: Mapped[str] = mapped_column(ForeignKey("base_model.digest"))
    tokenizer_digest: Mapped[str]
    dataset_digest: Mapped[str | None]
    hyperparameters: Mapped[dict[str, Any]]  # the whole TrainSpec
    metrics: Mapped[dict[str, Any]]
    trained_tokens: Mapped[Zero]
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("adapter_version.id"))
    source_job: Mapped[str | None] = mapped_column(ForeignKey("ft_job.id"), unique=True)
    created_at: Mapped[Created]
    retired_at: Mapped[datetime | None]


class AdapterAlias(Base):
    """A name that moves between versions. With a canary, `canary_percent` of the requests go there."""

    __tablename__ = "adapter_alias"
    __table_args__ = (
        CheckConstraint("name ~ '^[a-z][a-z0-9._-]{0,62}$'", name="name"),
        CheckConstraint("canary_percent BETWEEN 0 AND 100", name="canary_percent"),
        CheckConstraint("canary_percent = 0 OR canary_version_id IS NOT NULL", name="canary"),
    )

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[TenantId]
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_version.id"))
    previous_version_id: Mapped[str | None] = mapped_column(ForeignKey("adapter_version.id"))
    canary_version_id: Mapped[str | None] = mapped_column(ForeignKey("adapter_version.id"))
    canary_percent: Mapped[Zero]
    updated_at: Mapped[Created]


class Outbox(Base):
    """A message to send once its transaction is committed; deleted when the relay has sent it."""

    __tablename__ = "outbox"

    id: Mapped[Seq]
    topic: Mapped[str]
    key: Mapped[str]
    due_at: Mapped[Created] = mapped_column(index=True)
    created_at: Mapped[Created]


class BgTask(Base):
    """Work for Celery that must happen: the sweeper sends it again until `done_at` is set."""

    __tablename__ = "bg_task"
    __table_args__ = (
        UniqueConstraint("kind", "ref"),
        Index("ix_bg_task_undone", "due_at", postgresql_where=text("done_at IS NULL")),
    )

    id: Mapped[Seq]
    kind: Mapped[str]
    ref: Mapped[str]
    due_at: Mapped[Created]
    done_at: Mapped[datetime | None]
    tries: Mapped[Zero]
    error: Mapped[str | None]
    created_at: Mapped[Created]


class Idempotency(Base):
    """Which resource an Idempotency-Key made, in the transaction that made it. Kept 24 hours."""

    __tablename__ = "idempotency"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[str]
    resource_id: Mapped[str]
    created_at: Mapped[Created] = mapped_column(index=True)


class AuditLog(Base):
    """Who changed what. Never prompts, never keys."""

    __tablename__ = "audit_log"

    id: Mapped[Seq]
    tenant_id: Mapped[TenantId]
    actor: Mapped[str]
    action: Mapped[str]
    object_id: Mapped[str]
    details: Mapped[dict[str, Any]]
    created_at: Mapped[Created]


class UsageRecord(Base):
    """What is billed, once by its id: a request's or a job's."""

    __tablename__ = "usage_record"
    __table_args__ = (
        one_of("kind", ("inference", "finetune")),
        Index("ix_usage_record_tenant_created", "tenant_id", "created_at"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenant.id"))
    key_id: Mapped[str | None]
    kind: Mapped[str]
    model: Mapped[str]
    version_id: Mapped[str | None]
    prompt_tokens: Mapped[Zero]
    completion_tokens: Mapped[Zero]
    cached_tokens: Mapped[Zero]
    trained_tokens: Mapped[Zero]
    created_at: Mapped[Created]
