"""The file of tokenised examples: safetensors with three tensors, written as a stream.

    offsets  int64 [n + 1]   example i is tokens[offsets[i]:offsets[i + 1]]
    tokens   int32 [N]
    mask     uint8 [N]       1: the token is a training target, predicted from those before it

Equal examples in equal order give equal bytes, so the file is named by its hash.
"""

from __future__ import annotations

import array
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from shared.messages import DatasetRef

CHUNK_BYTES = 1 << 20


def dataset_key(sha256: str) -> str:
    return f"datasets/sha256/{sha256[:2]}/{sha256}.safetensors"


class DatasetWriter:
    """Collects examples in temporary files, so that memory stays flat; a context manager."""

    def __init__(self, spool_dir: Path) -> None:
        spool_dir.mkdir(parents=True, exist_ok=True)
        self._tokens: IO[bytes] = tempfile.TemporaryFile(dir=spool_dir)  # noqa: SIM115 - closed in __exit__
        self._mask: IO[bytes] = tempfile.TemporaryFile(dir=spool_dir)  # noqa: SIM115
        self._offsets = array.array("q", [0])
        self.num_trained_tokens = 0

    @property
    def num_examples(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def append(self, tokens: Sequence[int], mask: Sequence[int]) -> None:
        """An example of two tokens or more, of which one after the first is a target."""
        num_targets = sum(mask[1:])
        if len(tokens) != len(mask) or len(tokens) < 2 or not num_targets:
            raise ValueError(f"{len(tokens)} tokens with {num_targets} targets are no example")
        self._tokens.write(array.array("i", tokens).tobytes())
        self._mask.write(bytes(mask))
        self._offsets.append(self.num_tokens + len(tokens))
        self.num_trained_tokens += num_targets

    def ref(self) -> DatasetRef:
        """Names the file by its content; `chunks` gives that content."""
        digest = hashlib.sha256()
        for chunk in self._content():
            digest.update(chunk)
        sha256 = digest.hexdigest()
        return DatasetRef(
            key=dataset_key(sha256),
            sha256=sha256,
            num_examples=self.num_examples,
            num_tokens=self.num_tokens,
            num_trained_tokens=self.num_trained_tokens,
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        for chunk in self._content():
            yield chunk

    def _content(self) -> Iterator[bytes]:
        yield self._header()
        yield self._offsets.tobytes()
        for file in (self._tokens, self._mask):
            file.seek(0)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _header(self) -> bytes:
        start, header = 0, {}
        for name, dtype, count, size in (
            ("offsets", "I64", self.num_examples + 1, 8),
            ("tokens", "I32", self.num_tokens, 4),
            ("mask", "U8", self.num_tokens, 1),
        ):
            header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, start + count * size]}
            start += count * size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._mask.close()
