"""The system of record: tables, the guard of the jobs' states, row level security."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

TRANSITIONS = {
    "validating_files": ("queued", "failed", "cancelled"),
    "queued": ("running", "paused", "cancelled", "failed"),
    "running": ("queued", "publishing", "paused", "cancelled", "failed"),
    "publishing": ("succeeded", "failed", "queued"),
    "paused": ("queued", "cancelled"),
}

# Whatever the services do, a job moves along these edges only, its fence never goes back, and what has
# ended stays as it ended.
GUARD = """
CREATE FUNCTION ft_job_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.status IN ('succeeded', 'failed', 'cancelled') THEN
    RAISE EXCEPTION 'job % is over (%)', OLD.id, OLD.status USING ERRCODE = 'CS001';
  END IF;
  IF NEW.status <> OLD.status AND NOT EXISTS (
    SELECT 1 FROM ft_transition WHERE src = OLD.status AND dst = NEW.status
  ) THEN
    RAISE EXCEPTION 'job % may not go from % to %', OLD.id, OLD.status, NEW.status USING ERRCODE = 'CS001';
  END IF;
  IF NEW.fence < OLD.fence THEN
    RAISE EXCEPTION 'the fence of job % went back', OLD.id USING ERRCODE = 'CS002';
  END IF;
  RETURN NEW;
END
$$;
CREATE TRIGGER ft_job_guard BEFORE UPDATE ON ft_job FOR EACH ROW EXECUTE FUNCTION ft_job_guard();
"""

TENANT_TABLES = (
    "adapter",
    "adapter_alias",
    "adapter_version",
    "api_key",
    "audit_log",
    "checkpoint",
    "file",
    "ft_event",
    "ft_job",
    "ft_metric",
    "idempotency",
    "usage_record",
)


def guard_jobs() -> None:
    edges = [{"src": src, "dst": dst} for src, targets in TRANSITIONS.items() for dst in targets]
    op.bulk_insert(sa.table("ft_transition", sa.column("src", sa.Text), sa.column("dst", sa.Text)), edges)
    op.execute(GUARD)


def isolate_tenants() -> None:
    """A transaction sees the rows of the tenant in `app.tenant`; all for '*'; none where it is unset."""
    for table, column in [("tenant", "id"), *((table, "tenant_id") for table in TENANT_TABLES)]:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant_isolation ON {table} "
            f"USING (current_setting('app.tenant', true) IN ({column}, '*'))"
        )


def upgrade() -> None:
    create_tables()
    guard_jobs()
    isolate_tenants()


def create_tables() -> None:
    op.create_table(
        "base_model",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tokenizer_digest", sa.Text(), nullable=False),
        sa.Column("chat_template", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_base_model")),
    )
    op.create_table(
        "bg_task",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column(
            "due_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("tries", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bg_task")),
        sa.UniqueConstraint("kind", "ref", name=op.f("uq_bg_task_kind_ref")),
    )
    op.create_index(
        "ix_bg_task_undone", "bg_task", ["due_at"], unique=False, postgresql_where=sa.text("done_at IS NULL")
    )
    op.create_table(
        "ft_transition",
        sa.Column("src", sa.Text(), nullable=False),
        sa.Column("dst", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("src", "dst", name=op.f("pk_ft_transition")),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column(
            "due_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(op.f("ix_outbox_due_at"), "outbox", ["due_at"], unique=False)
    op.create_table(
        "tenant",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("slug ~ '^[a-z0-9][a-z0-9-]{0,38}$'", name=op.f("ck_tenant_slug")),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenant_weight")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenant")),
        sa.UniqueConstraint("slug", name=op.f("uq_tenant_slug")),
    )
    op.create_table(
        "adapter",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "name ~ '^[a-z0-9][a-z0-9._-]{0,62}$' AND name !~ '\\.\\.'", name=op.f("ck_adapter_name")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_adapter_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_adapter_tenant_id_name")),
    )
    op.create_index(op.f("ix_adapter_tenant_id"), "adapter", ["tenant_id"], unique=False)
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_api_key_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_key_prefix")),
    )
    op.create_index(op.f("ix_api_key_tenant_id"), "api_key", ["tenant_id"], unique=False)
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_audit_log_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index(op.f("ix_audit_log_tenant_id"), "audit_log", ["tenant_id"], unique=False)
    op.create_table(
        "file",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("storage_key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="processed", nullable=False),
        sa.Column("status_details", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("status IN ('uploaded', 'processed', 'error')", name=op.f("ck_file_status")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_file_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file")),
        sa.UniqueConstraint("seq", name=op.f("uq_file_seq")),
    )
    op.create_index(op.f("ix_file_tenant_id"), "file", ["tenant_id"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("resource_id", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_idempotency_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_created_at"), "idempotency", ["created_at"], unique=False)
    op.create_table(
        "usage_record",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("kind IN ('inference', 'finetune')", name=op.f("ck_usage_record_kind")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_usage_record_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_record")),
    )
    op.create_index(
        "ix_usage_record_tenant_created", "usage_record", ["tenant_id", "created_at"], unique=False
    )
    op.create_table(
        "ft_job",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("training_file", sa.Text(), nullable=False),
        sa.Column("validation_file", sa.Text(), nullable=True),
        sa.Column("suffix", sa.Text(), nullable=True),
        sa.Column("method", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column(
            "hyperparameters", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        sa.Column("integrations", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("metadata", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("extension", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("promote", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("adapter_name", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("base_digest", sa.Text(), nullable=True),
        sa.Column("training_data", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column(
            "validation_data", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.Column("report", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("status", sa.Text(), server_default="validating_files", nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempt", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("no_progress", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("claimed_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "next_run_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("pause_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("furthest_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_steps", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("eta_s", sa.Double(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_param", sa.Text(), nullable=True),
        sa.Column("result_version", sa.Text(), nullable=True),
        sa.Column("fine_tuned_model", sa.Text(), nullable=True),
        sa.Column("result_file", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(status = 'succeeded') = (result_version IS NOT NULL)", name=op.f("ck_ft_job_result")
        ),
        sa.CheckConstraint(
            "(status IN ('running', 'publishing')) = (worker_id IS NOT NULL)", name=op.f("ck_ft_job_worker")
        ),
        sa.CheckConstraint(
            "status IN ('validating_files', 'queued', 'running', 'publishing', 'paused', "
            "'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_ft_job_status"),
        ),
        sa.ForeignKeyConstraint(
            ["base_digest"], ["base_model.digest"], name=op.f("fk_ft_job_base_digest_base_model")
        ),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.id"], name=op.f("fk_ft_job_key_id_api_key")),
        sa.ForeignKeyConstraint(["result_file"], ["file.id"], name=op.f("fk_ft_job_result_file_file")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_ft_job_tenant_id_tenant")),
        sa.ForeignKeyConstraint(["training_file"], ["file.id"], name=op.f("fk_ft_job_training_file_file")),
        sa.ForeignKeyConstraint(
            ["validation_file"], ["file.id"], name=op.f("fk_ft_job_validation_file_file")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ft_job")),
        sa.UniqueConstraint("seq", name=op.f("uq_ft_job_seq")),
    )
    op.create_index(
        "ix_ft_job_leased",
        "ft_job",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("status IN ('running', 'publishing')"),
    )
    op.create_index(
        "ix_ft_job_ready",
        "ft_job",
        ["priority", "next_run_at"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index("ix_ft_job_request", "ft_job", ["tenant_id", "request_hash", "created_at"], unique=False)
    op.create_index(op.f("ix_ft_job_tenant_id"), "ft_job", ["tenant_id"], unique=False)
    op.create_table(
        "adapter_version",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("files", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("base_digest", sa.Text(), nullable=False),
        sa.Column("tokenizer_digest", sa.Text(), nullable=False),
        sa.Column("dataset_digest", sa.Text(), nullable=True),
        sa.Column(
            "hyperparameters", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        sa.Column("metrics", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("source_job", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name=op.f("ck_adapter_version_digest")),
        sa.CheckConstraint(
            "state IN ('PENDING', 'READY', 'FAILED', 'RETIRED')", name=op.f("ck_adapter_version_state")
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name=op.f("fk_adapter_version_adapter_id_adapter")
        ),
        sa.ForeignKeyConstraint(
            ["base_digest"], ["base_model.digest"], name=op.f("fk_adapter_version_base_digest_base_model")
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["adapter_version.id"], name=op.f("fk_adapter_version_parent_id_adapter_version")
        ),
        sa.ForeignKeyConstraint(
            ["source_job"], ["ft_job.id"], name=op.f("fk_adapter_version_source_job_ft_job")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenant.id"], name=op.f("fk_adapter_version_tenant_id_tenant")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter_version")),
        sa.UniqueConstraint("adapter_id", "version", name=op.f("uq_adapter_version_adapter_id_version")),
        sa.UniqueConstraint("source_job", name=op.f("uq_adapter_version_source_job")),
        sa.UniqueConstraint("tenant_id", "model_name", name=op.f("uq_adapter_version_tenant_id_model_name")),
    )
    op.create_index(op.f("ix_adapter_version_digest"), "adapter_version", ["digest"], unique=False)
    op.create_index(op.f("ix_adapter_version_tenant_id"), "adapter_version", ["tenant_id"], unique=False)
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("manifest_key", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.Text(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["ft_job.id"], name=op.f("fk_checkpoint_job_id_ft_job")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_checkpoint_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
        sa.UniqueConstraint("job_id", "step", "fence", name=op.f("uq_checkpoint_job_id_step_fence")),
        sa.UniqueConstraint("seq", name=op.f("uq_checkpoint_seq")),
    )
    op.create_index(op.f("ix_checkpoint_tenant_id"), "checkpoint", ["tenant_id"], unique=False)
    op.create_table(
        "ft_event",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("level", sa.Text(), server_default="info", nullable=False),
        sa.Column("type", sa.Text(), server_default="message", nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("level IN ('info', 'warn', 'error')", name=op.f("ck_ft_event_level")),
        sa.CheckConstraint("type IN ('message', 'metrics')", name=op.f("ck_ft_event_type")),
        sa.ForeignKeyConstraint(["job_id"], ["ft_job.id"], name=op.f("fk_ft_event_job_id_ft_job")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_ft_event_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ft_event")),
        sa.UniqueConstraint("seq", name=op.f("uq_ft_event_seq")),
    )
    op.create_index("ix_ft_event_job", "ft_event", ["job_id", "seq"], unique=False)
    op.create_index(op.f("ix_ft_event_tenant_id"), "ft_event", ["tenant_id"], unique=False)
    op.create_table(
        "ft_metric",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("train_loss", sa.Double(), nullable=True),
        sa.Column("train_mean_token_accuracy", sa.Double(), nullable=True),
        sa.Column("valid_loss", sa.Double(), nullable=True),
        sa.Column("valid_mean_token_accuracy", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("num_tokens", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_s", sa.Double(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["job_id"], ["ft_job.id"], name=op.f("fk_ft_metric_job_id_ft_job")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_ft_metric_tenant_id_tenant")),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_ft_metric")),
    )
    op.create_index(op.f("ix_ft_metric_tenant_id"), "ft_metric", ["tenant_id"], unique=False)
    op.create_table(
        "adapter_alias",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("previous_version_id", sa.Text(), nullable=True),
        sa.Column("canary_version_id", sa.Text(), nullable=True),
        sa.Column("canary_percent", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("name ~ '^[a-z][a-z0-9._-]{0,62}$'", name=op.f("ck_adapter_alias_name")),
        sa.CheckConstraint(
            "canary_percent = 0 OR canary_version_id IS NOT NULL", name=op.f("ck_adapter_alias_canary")
        ),
        sa.CheckConstraint("canary_percent BETWEEN 0 AND 100", name=op.f("ck_adapter_alias_canary_percent")),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapter.id"], name=op.f("fk_adapter_alias_adapter_id_adapter")
        ),
        sa.ForeignKeyConstraint(
            ["canary_version_id"],
            ["adapter_version.id"],
            name=op.f("fk_adapter_alias_canary_version_id_adapter_version"),
        ),
        sa.ForeignKeyConstraint(
            ["previous_version_id"],
            ["adapter_version.id"],
            name=op.f("fk_adapter_alias_previous_version_id_adapter_version"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.id"], name=op.f("fk_adapter_alias_tenant_id_tenant")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_version.id"], name=op.f("fk_adapter_alias_version_id_adapter_version")
        ),
        sa.PrimaryKeyConstraint("adapter_id", "name", name=op.f("pk_adapter_alias")),
    )
    op.create_index(op.f("ix_adapter_alias_tenant_id"), "adapter_alias", ["tenant_id"], unique=False)
    op.create_foreign_key(
        "fk_ft_job_result_version_adapter_version", "ft_job", "adapter_version", ["result_version"], ["id"]
    )
