"""Bytes under keys: one set of verbs over a local folder (`file:///path`) and S3 (`s3://bucket/prefix`).

A write is whole or not at all, and keys are made by us from ids and hashes, never from a customer's words.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, S3Store

from shared.config import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config

CHUNK_BYTES = 1 << 20
RETRIES = 5  # with backoff, of each request to S3
RETRY_TIME = timedelta(seconds=60)


class ObjectMissingError(LookupError):
    """No object lies under the key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no object {key}")
        self.key = key


class ObjectTooLargeError(ValueError):
    """A stream went past its limit."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    key: str
    size_bytes: int
    last_modified: datetime


class Sha256Stream:
    """Passes chunks through; after the last one `size_bytes` and `sha256` tell what went by.

    Raises ObjectTooLargeError as soon as more than `max_bytes` have come.
    """

    def __init__(self, chunks: AsyncIterable[bytes], max_bytes: int | None = None) -> None:
        self._chunks = chunks
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self.size_bytes += len(chunk)
            if self._max_bytes is not None and self.size_bytes > self._max_bytes:
                raise ObjectTooLargeError(f"more than {self._max_bytes} bytes")
            self._hash.update(chunk)
            yield chunk


class ObjectStore:
    """Async verbs for services, `*_sync` twins for the worker's threads."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    @classmethod
    def from_settings(cls, settings: Settings) -> ObjectStore:
        url = urlsplit(settings.object_store_url)
        if url.scheme == "file" and not url.netloc:
            return cls(LocalStore(Path(unquote(url.path)), mkdir=True))
        if url.scheme == "s3" and url.netloc:
            return cls(s3_store(settings, url.netloc, url.path.strip("/")))
        raise ValueError(
            f"object_store_url {settings.object_store_url!r} is neither file:///path nor s3://bucket/prefix"
        )

    async def put(
        self, key: str, data: bytes | Path | AsyncIterable[bytes], *, create_only: bool = False
    ) -> bool:
        """Writes the object; with `create_only`, False and no change where one is there already.

        Large data is uploaded in parts, but a `create_only` write goes in one piece through memory.
        """
        try:
            await obstore.put_async(self._store, key, data, mode="create" if create_only else None)
        except AlreadyExistsError:
            return False
        return True

    async def get(self, key: str) -> bytes:
        try:
            result = await obstore.get_async(self._store, key)
        except FileNotFoundError:
            raise ObjectMissingError(key) from None
        return bytes(await result.bytes_async())

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`, which lies inside the object."""
        try:
            return bytes(await obstore.get_range_async(self._store, key, start=start, length=length))
        except FileNotFoundError:
            raise ObjectMissingError(key) from None

    async def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> AsyncIterator[bytes]:
        try:
            result = await obstore.get_async(self._store, key)
        except FileNotFoundError:
            raise ObjectMissingError(key) from None
        async for chunk in result.stream(min_chunk_size=chunk_bytes):
            yield bytes(chunk)

    async def size(self, key: str) -> int:
        """Bytes of the object; raises ObjectMissingError."""
        try:
            return (await obstore.head_async(self._store, key))["size"]
        except FileNotFoundError:
            raise ObjectMissingError(key) from None

    async def exists(self, key: str) -> bool:
        try:
            await self.size(key)
        except ObjectMissingError:
            return False
        return True

    async def sha256(self, key: str) -> str:
        """Reads the whole object and hashes it."""
        stream = Sha256Stream(self.stream(key))
        async for _ in stream:
            pass
        return stream.sha256

    async def delete(self, key: str) -> None:
        """What is gone already is as good."""
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError:
            return

    async def list(self, prefix: str) -> AsyncIterator[StoredObject]:
        """Every object below the folder `prefix`, in no order."""
        async for found in obstore.list(self._store, prefix=prefix):
            for item in found:
                yield StoredObject(item["path"], item["size"], item["last_modified"])

    def put_sync(self, key: str, data: bytes | Path, *, create_only: bool = False) -> bool:
        try:
            obstore.put(self._store, key, data, mode="create" if create_only else None)
        except AlreadyExistsError:
            return False
        return True

    def get_sync(self, key: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            raise ObjectMissingError(key) from None

    def exists_sync(self, key: str) -> bool:
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True


def s3_store(settings: Settings, bucket: str, prefix: str) -> S3Store:
    """Path-style requests where an endpoint is set, as S3 servers other than Amazon's want them."""
    config: S3Config = {"region": settings.s3_region}
    if settings.s3_endpoint:
        config["endpoint"] = settings.s3_endpoint
        config["virtual_hosted_style_request"] = False
    if settings.s3_access_key_id and settings.s3_secret_access_key:
        config["access_key_id"] = settings.s3_access_key_id.get_secret_value()
        config["secret_access_key"] = settings.s3_secret_access_key.get_secret_value()
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options={
            "allow_http": (settings.s3_endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=3),
            "read_timeout": timedelta(seconds=20),
            "timeout": timedelta(seconds=300),
        },
        retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_TIME},
    )
