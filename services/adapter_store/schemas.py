"""The registry API's JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from shared.models import Adapter, AdapterAlias, AdapterVersion, AuditLog


class Reply(BaseModel):
    model_config = ConfigDict(frozen=True)


class Body(BaseModel):
    """Unknown fields are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VersionReply(Reply):
    id: str
    adapter: str
    version: int
    state: str
    model: str
    digest: str
    files: dict[str, str]
    size_bytes: int
    base_model: str
    base_digest: str
    tokenizer_digest: str
    dataset_digest: str | None
    hyperparameters: dict[str, Any]
    metrics: dict[str, float | None]
    trained_tokens: int
    parent: str | None
    job: str | None
    created_at: datetime
    retired_at: datetime | None

    @classmethod
    def of(cls, version: AdapterVersion, adapter_name: str) -> Self:
        return cls(
            id=version.id,
            adapter=adapter_name,
            version=version.version,
            state=version.state,
            model=version.model_name,
            digest=version.digest,
            files=version.files,
            size_bytes=version.size_bytes,
            base_model=version.base_model,
            base_digest=version.base_digest,
            tokenizer_digest=version.tokenizer_digest,
            dataset_digest=version.dataset_digest,
            hyperparameters=version.hyperparameters,
            metrics=version.metrics,
            trained_tokens=version.trained_tokens,
            parent=version.parent_id,
            job=version.source_job,
            created_at=version.created_at,
            retired_at=version.retired_at,
        )


class AliasReply(Reply):
    name: str
    version_id: str
    previous_version_id: str | None
    canary_version_id: str | None
    canary_percent: int
    updated_at: datetime

    @classmethod
    def of(cls, alias: AdapterAlias) -> Self:
        return cls.model_validate(alias, from_attributes=True)


class AdapterReply(Reply):
    id: str
    name: str
    created_at: datetime
    aliases: list[AliasReply]

    @classmethod
    def of(cls, adapter: Adapter, aliases: list[AdapterAlias]) -> Self:
        return cls(
            id=adapter.id,
            name=adapter.name,
            created_at=adapter.created_at,
            aliases=[AliasReply.of(alias) for alias in aliases],
        )


class AuditReply(Reply):
    id: int
    actor: str
    action: str
    object_id: str
    details: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, line: AuditLog) -> Self:
        return cls.model_validate(line, from_attributes=True)


class AdapterList(Reply):
    data: list[AdapterReply]


class VersionList(Reply):
    data: list[VersionReply]


class AuditList(Reply):
    data: list[AuditReply]


class MoveAlias(Body):
    """Where the alias is to point, and for a canary how much of its traffic goes elsewhere."""

    version: int = Field(ge=1)
    canary_version: int | None = Field(default=None, ge=1)
    canary_percent: int = Field(default=0, ge=0, le=100)


class RetireVersion(Body):
    drop_aliases: bool = False
