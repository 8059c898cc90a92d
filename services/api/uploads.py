"""A multipart upload as a stream: the file's bytes go by in chunks, the form's small fields are kept.

Nothing is spooled: whoever reads the file decides where its bytes go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from services.api.errors import PayloadTooLargeError, UnsupportedMediaTypeError
from services.api.limits import require_plain
from shared.errors import InvalidRequestError

MAX_PARTS = 8
MAX_FIELD_BYTES = 64 << 10
MAX_OVERHEAD_BYTES = 1 << 20  # of everything that is not the file
MAX_FILENAME_CHARS = 255
ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b")  # zip, gzip


class Part:
    """Headers of one part of the form; its bytes follow."""

    def __init__(self) -> None:
        self.headers: dict[str, bytes] = {}
        self.field = b""
        self.value = b""

    def add_header(self) -> None:
        self.headers[self.field.decode("latin-1").lower()] = self.value
        self.field = self.value = b""

    @property
    def options(self) -> dict[bytes, bytes]:
        return parse_options_header(self.headers.get("content-disposition", b""))[1]

    @property
    def name(self) -> str:
        return self.options.get(b"name", b"").decode("utf-8", "replace")

    @property
    def filename(self) -> str | None:
        """For people only: no path, no control characters."""
        given = self.options.get(b"filename")
        if given is None:
            return None
        text = given.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
        return "".join(char for char in text if char.isprintable())[:MAX_FILENAME_CHARS] or "upload"


Event = Part | bytes | None  # a part begins; bytes of it; it ends


class Upload:
    """Iterate `file()` to its end once; then `fields` is complete. `filename` is known from its first chunk on.

    Raises ServiceError for anything that is no form with one file in it.
    """

    def __init__(self, request: Request, max_file_bytes: int) -> None:
        require_plain(request)
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._request = request
        self._max_bytes = max_file_bytes + MAX_OVERHEAD_BYTES
        self._events: deque[Event] = deque()
        self._num_parts = 0
        self._parser = MultipartParser(boundary_of(request), cast(Any, self._callbacks()))

    async def file(self) -> AsyncIterator[bytes]:
        events = self._all_events()
        found = False
        async for event in events:
            if not isinstance(event, Part):
                raise InvalidRequestError("the form is broken", code="invalid_form")
            if event.filename is None:
                self.fields[event.name] = await read_field(events)
                continue
            if found or event.name != "file":
                raise InvalidRequestError("exactly one file is expected, in the field `file`", param="file")
            found, self.filename = True, event.filename
            async for chunk in until_end(events):
                yield chunk
        if not found:
            raise InvalidRequestError("the field `file` is missing", param="file")

    async def _all_events(self) -> AsyncGenerator[Event, None]:
        num_bytes = 0
        try:
            async for chunk in self._request.stream():
                num_bytes += len(chunk)
                if num_bytes > self._max_bytes:
                    raise PayloadTooLargeError("the file is larger than the limit", param="file")
                self._parser.write(chunk)
                while self._events:
                    yield self._events.popleft()
            self._parser.finalize()
        except FormParserError as error:
            raise InvalidRequestError(f"the form is broken: {error}", code="invalid_form") from None
        except ClientDisconnect:
            raise InvalidRequestError("the upload was cut short", code="invalid_form") from None
        while self._events:
            yield self._events.popleft()

    def _callbacks(self) -> dict[str, Callable[..., None]]:
        part = Part()

        def begin() -> None:
            nonlocal part
            part = Part()
            self._num_parts += 1
            if self._num_parts > MAX_PARTS:
                raise InvalidRequestError(f"the form has more than {MAX_PARTS} parts", code="invalid_form")

        def header_field(data: bytes, start: int, end: int) -> None:
            part.field += data[start:end]

        def header_value(data: bytes, start: int, end: int) -> None:
            part.value += data[start:end]

        return {
            "on_part_begin": begin,
            "on_header_field": header_field,
            "on_header_value": header_value,
            "on_header_end": lambda: part.add_header(),
            "on_headers_finished": lambda: self._events.append(part),
            "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
            "on_part_end": lambda: self._events.append(None),
        }


def boundary_of(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMediaTypeError("expected multipart/form-data with a boundary")
    return boundary


async def until_end(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """The bytes of the part that has begun; an archive is refused by its first bytes."""
    is_first = True
    async for event in events:
        if event is None:
            return
        if isinstance(event, bytes):
            if is_first and event.startswith(ARCHIVES):
                raise UnsupportedMediaTypeError("compressed files are not accepted", param="file")
            is_first = False
            yield event
    raise InvalidRequestError("the form ends within a part", code="invalid_form")


async def read_field(events: AsyncIterator[Event]) -> str:
    value = b""
    async for chunk in until_end(events):
        value += chunk
        if len(value) > MAX_FIELD_BYTES:
            raise PayloadTooLargeError("a field of the form is too large")
    return value.decode("utf-8", "replace")
