"""Files: streamed in, hashed, listed, read back, deleted."""

from __future__ import annotations

import asyncio
import hashlib
import time

import httpx
import openai
import pytest

from shared.storage import ObjectStore
from tests.api.conftest import Api, ServerThread

CONTENT = b'{"messages": []}\n' * 3


def objects(api: Api) -> list[str]:
    async def keys() -> list[str]:
        return [found.key async for found in ObjectStore.from_settings(api.settings).list("files")]

    return asyncio.run(keys())


def test_a_file_comes_back_as_it_was_sent(idle_api: Api) -> None:
    client = idle_api.openai()
    data = bytes(range(256)) * 10_000
    file = client.files.create(file=("../träin.jsonl", data), purpose="fine-tune")
    assert file.id.startswith("file-")
    assert (file.bytes, file.purpose, file.status) == (len(data), "fine-tune", "processed")
    assert file.filename == "träin.jsonl"
    assert client.files.retrieve(file.id) == file
    content = client.files.content(file.id)
    assert hashlib.sha256(content.read()).digest() == hashlib.sha256(data).digest()
    assert content.response.headers["x-content-type-options"] == "nosniff"
    assert client.files.wait_for_processing(file.id).status == "processed"


def test_a_deleted_file_is_gone(idle_api: Api) -> None:
    client = idle_api.openai()
    file = client.files.create(file=("a.jsonl", CONTENT), purpose="fine-tune")
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for act in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError):
            act(file.id)
    assert list(client.files.list()) == []


def test_files_are_listed_in_pages(idle_api: Api) -> None:
    client = idle_api.openai()
    made = [client.files.create(file=(f"{i}.jsonl", CONTENT), purpose="fine-tune").id for i in range(5)]
    made.append(client.files.create(file=("x.txt", CONTENT), purpose="user_data").id)
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=4, order="asc")] == made
    assert [file.id for file in client.files.list(purpose="user_data")] == made[-1:]
    page = client.files.list(limit=2)
    assert (page.has_more, page.first_id, page.last_id) == (True, made[-1], made[-2])
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


def test_an_expiry_is_kept(idle_api: Api) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = idle_api.openai().files.create(file=("a", CONTENT), purpose="fine-tune", expires_after=expiry)
    assert file.expires_at - file.created_at == 3600


def test_the_order_of_the_forms_fields_does_not_matter(idle_api: Api) -> None:
    parts = [("file", ("a.jsonl", CONTENT)), ("purpose", (None, "fine-tune"))]
    with idle_api.http() as http:
        response = http.post("/v1/files", files=parts)
    assert response.status_code == 200
    assert response.json()["bytes"] == len(CONTENT)


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([("purpose", (None, "fine-tune"))], 400),
        ([("file", ("a", CONTENT))], 400),
        ([("file", ("a", CONTENT)), ("purpose", (None, "other"))], 400),
        ([("file", ("a", CONTENT)), ("file", ("b", CONTENT)), ("purpose", (None, "fine-tune"))], 400),
        ([("data", ("a", CONTENT)), ("purpose", (None, "fine-tune"))], 400),
        ([("file", ("a", CONTENT)), ("purpose", (None, "fine-tune")), ("tenant_id", (None, "x"))], 400),
        ([("purpose", (None, "x" * 70_000)), ("file", ("a", CONTENT))], 413),
        ([(f"f{i}", (None, "x")) for i in range(9)], 400),
        ([("purpose", (None, "fine-tune")), ("file", ("a", b"PK\x03\x04zip"))], 415),
        ([("purpose", (None, "fine-tune")), ("file", ("a", b"\x1f\x8b\x08gzip"))], 415),
        (
            [
                ("file", ("a", CONTENT)),
                ("purpose", (None, "fine-tune")),
                ("expires_after[seconds]", (None, "1")),
            ],
            400,
        ),
    ],
)
def test_a_form_that_is_wrong_leaves_nothing_behind(idle_api: Api, parts: list, status: int) -> None:
    with idle_api.http() as http:
        response = http.post("/v1/files", files=parts)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    time.sleep(0.1)
    assert objects(idle_api) == []


def test_other_bodies_than_forms_are_refused(idle_api: Api) -> None:
    with idle_api.http() as http:
        assert http.post("/v1/files", json={}).status_code == 415
        headers = {"content-type": "multipart/form-data; boundary=x"}
        for content in (
            b"",
            b"garbage",
            b"--x\r\n",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nab',
        ):
            assert http.post("/v1/files", content=content, headers=headers).status_code == 400
        packed = headers | {"content-encoding": "gzip"}
        assert http.post("/v1/files", content=b"x", headers=packed).status_code == 415
    assert objects(idle_api) == []


def test_a_file_above_the_limit_is_refused_while_it_arrives(api_settings) -> None:
    small = api_settings.model_copy(update={"max_file_bytes": 100_000})
    with ServerThread(small):
        api = Api(small, None)
        api.openai().files.create(file=("a", b"x" * 100_000), purpose="fine-tune")
        with pytest.raises(openai.APIStatusError) as caught:
            api.openai().files.create(file=("a", b"x" * 100_001), purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
        assert len(objects(api)) == 1


def test_an_upload_that_breaks_off_leaves_nothing_behind(idle_api: Api) -> None:
    def half() -> object:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"a" * 200_000
        raise ConnectionError

    headers = {"content-type": "multipart/form-data; boundary=x", "content-length": "900000"}
    with idle_api.http() as http, pytest.raises((ConnectionError, httpx.HTTPError)):
        http.post("/v1/files", content=half(), headers=headers)
    time.sleep(0.3)
    assert objects(idle_api) == []
