"""The object store's two twins, a local folder and S3, behave the same."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shared.config import Settings
from shared.storage import ObjectMissingError, ObjectStore, ObjectTooLargeError, Sha256Stream

PART = b"x" * 3_000_000


async def parts(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield PART


async def broken_parts() -> AsyncIterator[bytes]:
    yield PART * 2
    raise RuntimeError("the sender went away")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_settings(endpoint: str, bucket: str) -> Settings:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    return Settings(
        object_store_url=f"s3://{bucket}/some/prefix",
        s3_endpoint=endpoint,
        s3_access_key_id="test",
        s3_secret_access_key="test",
    )


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return ObjectStore.from_settings(Settings(object_store_url=f"file://{tmp_path}/objects"))
    bucket = "b-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    return ObjectStore.from_settings(s3_settings(request.getfixturevalue("s3_endpoint"), bucket))


async def test_what_was_put_is_read_back_whole_in_ranges_and_streamed(store: ObjectStore) -> None:
    assert await store.put("files/a", b"hello world")
    assert await store.get("files/a") == b"hello world"
    assert await store.get_range("files/a", 6, 5) == b"world"
    assert await store.get_range("files/a", 6, 500) == b"world"
    assert [chunk async for chunk in store.stream("files/a")] == [b"hello world"]
    assert await store.size("files/a") == 11


async def test_a_create_only_put_never_changes_an_object(store: ObjectStore) -> None:
    assert await store.put("adapters/a", b"first", create_only=True)
    assert not await store.put("adapters/a", b"second", create_only=True)
    assert not store.put_sync("adapters/a", b"third", create_only=True)
    assert await store.get("adapters/a") == b"first"


async def test_a_stream_is_stored_and_hashed_on_its_way(store: ObjectStore) -> None:
    stream = Sha256Stream(parts(4))
    await store.put("files/big", stream)
    assert stream.size_bytes == await store.size("files/big") == 4 * len(PART)
    assert stream.sha256 == hashlib.sha256(PART * 4).hexdigest() == await store.sha256("files/big")


async def test_a_stream_that_breaks_off_leaves_nothing(store: ObjectStore) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        await store.put("files/broken", broken_parts())
    assert not await store.exists("files/broken")


async def test_a_stream_over_its_limit_is_refused(store: ObjectStore) -> None:
    with pytest.raises(ObjectTooLargeError):
        await store.put("files/large", Sha256Stream(parts(3), max_bytes=len(PART) * 2))
    assert not await store.exists("files/large")


async def test_missing_objects_are_told_apart_from_empty_ones(store: ObjectStore) -> None:
    await store.put("files/empty", b"")
    assert await store.get("files/empty") == b""
    for read in (store.get("no"), store.size("no"), store.get_range("no", 0, 1), store.sha256("no")):
        with pytest.raises(ObjectMissingError):
            await read
    with pytest.raises(ObjectMissingError):
        store.get_sync("no")
    assert not store.exists_sync("no")


async def test_deleting_twice_is_deleting_once(store: ObjectStore) -> None:
    await store.put("files/a", b"1")
    await store.delete("files/a")
    await store.delete("files/a")
    assert not await store.exists("files/a")


async def test_listing_stays_inside_its_folder(store: ObjectStore) -> None:
    for key in ("files/t1/a", "files/t1/b", "files/t10/c"):
        await store.put(key, b"12")
    found = [item async for item in store.list("files/t1")]
    assert sorted(item.key for item in found) == ["files/t1/a", "files/t1/b"]
    assert {item.size_bytes for item in found} == {2}


async def test_the_synchronous_twins_see_the_same_objects(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(PART * 3)
    assert store.put_sync("checkpoints/a", path)
    assert await store.get("checkpoints/a") == PART * 3
    assert store.get_sync("checkpoints/a") == PART * 3
    assert store.exists_sync("checkpoints/a")


@pytest.mark.parametrize("key", ["../a", "a/../../b", "a//b"])
async def test_a_key_cannot_climb_out(store: ObjectStore, key: str) -> None:
    with pytest.raises(ValueError):
        await store.put(key, b"1")


@pytest.mark.parametrize("url", ["", "ftp://a/b", "file://host/path", "s3://", "/tmp/x"])
def test_an_unknown_store_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="object_store_url"):
        ObjectStore.from_settings(Settings(object_store_url=url))
