"""Makes the bucket on an S3 server of our own; on a hosted one it is made by whoever owns the account."""

from __future__ import annotations

import time
from datetime import timedelta
from urllib.parse import urlsplit

import httpx
import obstore

from services.errors import OperatorError
from shared.config import Settings
from shared.storage import s3_store

WAIT_S = 60.0
MADE_BEFORE = 409  # BucketAlreadyOwnedByYou


class BucketError(OperatorError):
    """The bucket cannot be made with these settings."""


def create_bucket(settings: Settings, wait_s: float = WAIT_S) -> str:
    """The name of the bucket of `object_store_url`, which exists from now on. Waits for the server."""
    url = urlsplit(settings.object_store_url)
    if url.scheme != "s3" or not url.netloc:
        raise BucketError(f"{settings.object_store_url} names no bucket: expected s3://bucket")
    store = s3_store(settings, url.netloc, "")
    address = obstore.sign(store, "PUT", "", timedelta(minutes=5))
    response = put(address, time.monotonic() + wait_s)
    if response.status_code not in (200, MADE_BEFORE):
        raise BucketError(f"bucket {url.netloc}: {response.status_code} {response.text[:300]}")
    return url.netloc


def put(address: str, deadline: float) -> httpx.Response:
    while True:
        try:
            response = httpx.put(address, timeout=10.0)
            if response.status_code < 500 or time.monotonic() > deadline:
                return response
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise BucketError(f"{urlsplit(address).netloc} does not answer: {error}") from error
        time.sleep(0.5)
