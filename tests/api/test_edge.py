"""Clients that dribble, lie about sizes, or never come to the point."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from services.api.server import DeadlineProtocol, make_config
from shared.config import Settings
from tests.api.conftest import Api, ServerThread

BODY = b'{"model": "tiny", "messages": []}'


class HastyProtocol(DeadlineProtocol):
    headers_s = 0.3
    body_s = 0.3
    upload_s = 0.8
    max_connections = 8


@pytest.fixture
def hasty(api_settings: Settings) -> Iterator[Api]:
    thread = ServerThread(api_settings)
    config = make_config(api_settings)
    config.http = HastyProtocol
    thread.server = uvicorn.Server(config)
    thread.thread = threading.Thread(target=thread.server.run, daemon=True)
    with thread:
        yield Api(api_settings, None)


def connect(api: Api) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10)


def head(api: Api, path: str = "/v1/chat/completions", *lines: str) -> bytes:
    start = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {api.key()}", *lines]
    return "\r\n".join(start).encode() + b"\r\n\r\n"


def seconds_until_closed(connection: socket.socket, dribble: bytes = b"") -> float:
    """While sending a byte now and then."""
    started = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - started < 8:
        try:
            if not connection.recv(65536):
                break
        except TimeoutError:
            pass
        except ConnectionError:
            break
        try:
            connection.send(dribble)
        except OSError:
            break
    return time.monotonic() - started


def test_a_connection_without_a_request_is_closed(hasty: Api) -> None:
    assert seconds_until_closed(connect(hasty)) < 3


def test_dribbled_headers_are_cut_off(hasty: Api) -> None:
    connection = connect(hasty)
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: ")
    assert seconds_until_closed(connection, b"a") < 3


def test_a_dribbled_body_is_cut_off(hasty: Api) -> None:
    connection = connect(hasty)
    connection.sendall(
        head(hasty, "/v1/chat/completions", "Content-Length: 1000", "Content-Type: application/json")
    )
    assert seconds_until_closed(connection, b" ") < 3


def test_uploads_have_more_time(hasty: Api) -> None:
    connection = connect(hasty)
    connection.sendall(
        head(hasty, "/v1/files", "Content-Length: 1000", "Content-Type: multipart/form-data; boundary=x")
    )
    assert 0.6 < seconds_until_closed(connection, b"-") < 4


def test_an_answer_may_take_longer_than_the_question(hasty: Api) -> None:
    with hasty.http() as http:
        for _ in range(3):
            time.sleep(0.4)  # kept alive between requests
            assert http.get("/v1/models").status_code == 200


def test_more_connections_than_allowed_are_dropped(hasty: Api) -> None:
    connections = [connect(hasty) for _ in range(8)]
    time.sleep(0.1)
    late = connect(hasty)
    assert seconds_until_closed(late) < 0.25
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 120_000 + b"\r\n\r\n",
        b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : x\r\n\r\n",
        b"garbage\r\n\r\n",
    ],
)
def test_requests_with_two_meanings_or_none_are_refused(idle_api: Api, request_bytes: bytes) -> None:
    with connect(idle_api) as connection:
        connection.sendall(request_bytes)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    status = int(answer.split()[1])
    assert status in (400, 401, 501)
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_shorter_than_promised_is_no_request(idle_api: Api) -> None:
    with connect(idle_api) as connection:
        connection.sendall(head(idle_api, "/v1/chat/completions", f"Content-Length: {len(BODY) + 5}") + BODY)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert b" 200 " not in answer
    assert idle_api.http().get("/livez").status_code == 200
