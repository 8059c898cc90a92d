"""Making the bucket on an S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from services.bucket import BucketError, create_bucket
from shared.config import Settings
from shared.storage import ObjectStore


@pytest.fixture
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def make_settings(endpoint: str, url: str = "s3://flexllm/prefix") -> Settings:
    return Settings(
        object_store_url=url, s3_endpoint=endpoint, s3_access_key_id="id", s3_secret_access_key="secret"
    )


def test_a_bucket_is_made_once_and_then_takes_objects(s3_endpoint: str) -> None:
    settings = make_settings(s3_endpoint)
    assert create_bucket(settings) == "flexllm"
    assert create_bucket(settings) == "flexllm"
    assert ObjectStore.from_settings(settings).put_sync("a/b", b"content", create_only=True)


def test_an_s3_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(BucketError, match=r"127\.0\.0\.1:9 does not answer"):
        create_bucket(make_settings("http://127.0.0.1:9"), wait_s=0)


def test_a_store_that_is_no_bucket_is_refused() -> None:
    with pytest.raises(BucketError, match="names no bucket"):
        create_bucket(Settings(object_store_url="file:///tmp/objects"))
