"""POST, GET /v1/files; GET, DELETE /v1/files/{id}; GET /v1/files/{id}/content"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse

from services.api.deps import OwnerDep, StateDep, TrainDep
from services.api.errors import PayloadTooLargeError
from services.api.formats.objects import file_object, page
from services.api.state import ApiState
from services.api.uploads import Upload
from shared.db import tenant_transaction
from shared.errors import InvalidRequestError
from shared.files import create_file, delete_file, file_key, get_file, list_files
from shared.ids import new_id
from shared.keys import KeyOwner
from shared.models import File
from shared.storage import ObjectTooLargeError, Sha256Stream

router = APIRouter()

PURPOSES = (
    "fine-tune",
    "fine-tune-results",
    "batch",
    "batch_output",
    "user_data",
    "evals",
    "assistants",
    "vision",
)
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
EXPIRY_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")


@router.post("/v1/files")
async def create(request: Request, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    upload = Upload(request, state.settings.max_file_bytes)
    file_id = new_id("file-")
    content = await store_content(state, upload, file_key(owner.tenant_id, file_id))
    try:
        return file_object(await make_row(state, owner, upload, file_id, content))
    except BaseException:
        state.background.spawn(state.store.delete(file_key(owner.tenant_id, file_id)))
        raise


async def store_content(state: ApiState, upload: Upload, key: str) -> Sha256Stream:
    """Straight from the socket into the object store; an upload that breaks off leaves nothing."""
    content = Sha256Stream(upload.file(), state.settings.max_file_bytes)
    try:
        await state.store.put(key, content)
    except ObjectTooLargeError:
        limit = state.settings.max_file_bytes
        raise PayloadTooLargeError(f"the file is larger than {limit} bytes", param="file") from None
    return content


async def make_row(
    state: ApiState, owner: KeyOwner, upload: Upload, file_id: str, content: Sha256Stream
) -> File:
    purpose, expires_after_s = check_fields(upload.fields)
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        return await create_file(
            session,
            owner.tenant_id,
            file_id=file_id,
            filename=upload.filename,
            purpose=purpose,
            size_bytes=content.size_bytes,
            sha256=content.sha256,
            expires_after_s=expires_after_s,
        )


def check_fields(fields: dict[str, str]) -> tuple[str, int | None]:
    """The purpose, and seconds until the file expires."""
    for name in fields:
        if name not in ("purpose", *EXPIRY_FIELDS):
            message = f"Unrecognized request argument supplied: {name[:100]}"
            raise InvalidRequestError(message, param=name[:100], code="unknown_parameter")
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        raise InvalidRequestError(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    anchor, seconds = (fields.get(name) for name in EXPIRY_FIELDS)
    if anchor is None and seconds is None:
        return purpose, None
    if anchor != "created_at":
        raise InvalidRequestError("the anchor must be created_at", param=EXPIRY_FIELDS[0])
    is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
    if seconds is None or not is_number or not MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S:
        message = f"the seconds must be between {MIN_EXPIRY_S} and {MAX_EXPIRY_S}"
        raise InvalidRequestError(message, param=EXPIRY_FIELDS[1])
    return purpose, int(seconds)


@router.get("/v1/files")
async def list_all(
    owner: OwnerDep,
    state: StateDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        found = await list_files(
            session,
            owner.tenant_id,
            purpose=purpose,
            after=after,
            limit=limit,
            newest_first=order == "desc",
        )
    return page([file_object(file) for file in found.items], found.has_more, with_ends=True)


@router.get("/v1/files/{file_id}")
async def retrieve(file_id: str, owner: OwnerDep, state: StateDep) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        return file_object(await get_file(session, owner.tenant_id, file_id))


@router.get("/v1/files/{file_id}/content")
async def content(file_id: str, owner: OwnerDep, state: StateDep) -> StreamingResponse:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        file = await get_file(session, owner.tenant_id, file_id)
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    stream = state.store.stream(file.storage_key)
    return StreamingResponse(stream, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete(file_id: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        file = await get_file(session, owner.tenant_id, file_id)
        await delete_file(session, owner.tenant_id, file_id)
    state.background.spawn(state.tasks.send("delete_object", file.storage_key))
    return {"id": file_id, "object": "file", "deleted": True}
