"""The worker's calls to the adapter store, and checked reads and writes of object storage."""

from __future__ import annotations

import hashlib
import time
from typing import TypeVar

import httpx
import orjson

from shared.config import Settings
from shared.messages import (
    ADAPTER_FILES,
    AdapterRef,
    BeatReply,
    BeatRequest,
    CheckpointRef,
    ClaimRequest,
    CommitCheckpoint,
    EndJob,
    JobLease,
    Message,
    PublishReply,
    PublishRequest,
    adapter_prefix,
    checkpoint_prefix,
    content_digest,
)
from shared.storage import ObjectMissingError, ObjectStore

ReplyT = TypeVar("ReplyT", bound=Message)
ATTEMPTS = 5


class StaleFence(Exception):
    """Another worker has the job, or it is over: stop and discard."""


class StoreUnavailable(Exception):
    """The adapter store or the object storage did not answer; the call may be repeated."""


class CorruptObject(Exception):
    """An object's bytes are not those that its digest promises."""


class StoreClient:
    """Blocking; called from the worker's side threads, never from an engine step."""

    def __init__(self, settings: Settings, objects: ObjectStore) -> None:
        self._objects = objects
        self._http = httpx.Client(
            base_url=settings.adapter_store_url,
            headers={"authorization": f"Bearer {settings.internal_token.get_secret_value()}"},
            timeout=httpx.Timeout(10.0, connect=3.0),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    # --- jobs

    def claim(self, job_id: str, request: ClaimRequest) -> JobLease | None:
        """The lease, or None where the job is not to be had."""
        response = self._post(f"/internal/jobs/{job_id}/claim", request)
        if response.status_code in (404, 409):
            return None
        return JobLease.model_validate_json(_ok(response).content)

    def beat(self, job_id: str, request: BeatRequest) -> BeatReply:
        return BeatReply.model_validate_json(self._fenced(job_id, "beat", request).content)

    def end(self, job_id: str, request: EndJob) -> None:
        self._retried(job_id, "end", request)

    def commit_checkpoint(
        self, job_id: str, fence: int, checkpoint_id: str, step: int, files: dict[str, bytes]
    ) -> None:
        """Uploads the files, then the manifest, then makes the checkpoint the one to resume from."""
        prefix = checkpoint_prefix(job_id, fence, step)
        for name, data in files.items():
            self._objects.put_sync(f"{prefix}/{name}", data)
        entries = {n: {"sha256": _sha256(d), "size": len(d)} for n, d in files.items()}
        manifest = orjson.dumps(
            {"job_id": job_id, "step": step, "files": entries}, option=orjson.OPT_SORT_KEYS
        )
        self._objects.put_sync(f"{prefix}/manifest.json", manifest)
        commit = CommitCheckpoint(
            fence=fence,
            checkpoint_id=checkpoint_id,
            step=step,
            manifest_key=f"{prefix}/manifest.json",
            manifest_sha256=_sha256(manifest),
        )
        self._retried(job_id, "checkpoints", commit)

    def read_checkpoint(self, reference: CheckpointRef) -> dict[str, bytes]:
        """The checkpoint's files; raises CorruptObject where one is missing or differs from the manifest."""
        manifest = self.read_object(reference.manifest_key, reference.manifest_sha256)
        folder = reference.manifest_key.rsplit("/", 1)[0]
        return {
            name: self.read_object(f"{folder}/{name}", entry["sha256"])
            for name, entry in orjson.loads(manifest)["files"].items()
        }

    # --- adapters

    def publish(
        self,
        lease: JobLease,
        files: dict[str, bytes],
        base_digest: str,
        tokens: int,
        metrics: dict[str, float],
    ) -> PublishReply:
        """Puts the files under their content digest, then makes them a version: exactly once, however often."""
        hashes = {name: _sha256(data) for name, data in files.items()}
        digest = content_digest(hashes)
        for name, data in files.items():
            self._objects.put_sync(f"{adapter_prefix(digest)}/{name}", data, create_only=True)
        request = PublishRequest(
            fence=lease.fence,
            digest=digest,
            files=hashes,
            size_bytes=sum(len(data) for data in files.values()),
            base_digest=base_digest,
            trained_tokens=tokens,
            metrics=metrics,
        )
        return PublishReply.model_validate_json(self._retried(lease.job_id, "publish", request).content)

    def read_adapter(self, adapter: AdapterRef) -> dict[str, bytes]:
        """PEFT's two files; raises CorruptObject where they are not those of the digest."""
        files = {name: self._get(f"{adapter.prefix}/{name}") for name in ADAPTER_FILES}
        if digest_of(files) != adapter.digest:
            raise CorruptObject(
                f"adapter {adapter.version_id}: the files do not match digest {adapter.digest}"
            )
        return files

    def read_object(self, key: str, sha256: str) -> bytes:
        data = self._get(key)
        if _sha256(data) != sha256:
            raise CorruptObject(f"{key}: the bytes do not match sha256 {sha256}")
        return data

    def _get(self, key: str) -> bytes:
        try:
            return self._objects.get_sync(key)
        except ObjectMissingError as error:
            raise CorruptObject(str(error)) from error
        except OSError as error:
            raise StoreUnavailable(str(error)) from error

    # --- transport

    def _post(self, path: str, message: Message) -> httpx.Response:
        try:
            return self._http.post(
                path, content=message.model_dump_json(), headers={"content-type": "application/json"}
            )
        except httpx.HTTPError as error:
            raise StoreUnavailable(f"{path}: {type(error).__name__}: {error}") from error

    def _fenced(self, job_id: str, verb: str, message: Message) -> httpx.Response:
        response = self._post(f"/internal/jobs/{job_id}/{verb}", message)
        if response.status_code in (404, 409):
            raise StaleFence(f"{job_id}: {response.text[:200]}")
        return _ok(response)

    def _retried(self, job_id: str, verb: str, message: Message) -> httpx.Response:
        for attempt in range(ATTEMPTS):
            try:
                return self._fenced(job_id, verb, message)
            except StoreUnavailable:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")


def digest_of(files: dict[str, bytes]) -> str:
    """Content digest of an adapter's files."""
    return content_digest({name: _sha256(data) for name, data in files.items()})


def _ok(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise StoreUnavailable(f"{response.request.url.path} says {response.status_code}: {response.text[:200]}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
