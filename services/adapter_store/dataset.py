"""From an uploaded file to tokenised examples, or to a report that names every line that is wrong.

The file is read as a stream, line by line, and the examples are spooled to disk: memory stays flat whatever
the file holds. Nothing is truncated or skipped: an example that does not fit is an error.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.adapter_store.examples import ChatExample, CompletionExample, ExampleError, parse_example
from shared.dataset import DatasetWriter
from shared.messages import DatasetRef
from shared.storage import ObjectStore
from shared.tokenizer import ChatTemplateError, ChatTokenizer

MAX_LINE_BYTES = 1 << 20
MAX_LINES = 1_000_000
MAX_TOKENS = 500_000_000  # of one file
MAX_SHOWN_ERRORS = 50
MAX_ERRORS = 1000  # then the rest of the file is not looked at
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a file must meet, from the job and the settings."""

    max_seq_len: int
    min_examples: int = 1
    has_tools: bool = False  # the chat template shows tools and their calls
    budget_s: float = 600.0  # for one file


@dataclass(slots=True)
class Report:
    """Counts of one file, its first errors as (line, words), and the dataset where there is none.

    Line 0 stands for the file as a whole.
    """

    num_lines: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest_example: int = 0  # tokens
    num_too_long: int = 0
    num_errors: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)
    dataset: DatasetRef | None = None

    def add_error(self, line: int, message: str) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_SHOWN_ERRORS:
            self.errors.append((line, message))

    def summary(self) -> dict[str, Any]:
        """For the job's row and its events."""
        return {
            "lines": self.num_lines,
            "examples": self.num_examples,
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained_tokens,
            "longest_example": self.longest_example,
            "too_long": self.num_too_long,
            "error_count": self.num_errors,
            "errors": [{"line": line, "message": message} for line, message in self.errors],
        }

    def words(self, num_shown: int = 10) -> str:
        """The first errors as a sentence for people."""
        shown = [f"line {line}: {message}" if line else message for line, message in self.errors[:num_shown]]
        more = self.num_errors - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


async def read_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[tuple[int, bytes | None]]:
    """(number from 1, line without its end); None for a line of more than `MAX_LINE_BYTES`.

    A byte order mark at the start and carriage returns at the ends of lines are no part of the lines.
    """
    number, rest, too_long = 1, b"", False
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield number, None if too_long or len(line) > MAX_LINE_BYTES else clean(line, number)
            number, too_long = number + 1, False
        if len(rest) > MAX_LINE_BYTES:
            rest, too_long = b"", True
    if rest or too_long:
        yield number, None if too_long else clean(rest, number)


def clean(line: bytes, number: int) -> bytes:
    return (line.removeprefix(BOM) if number == 1 else line).removesuffix(b"\r")


def encode(
    example: ChatExample | CompletionExample, tokenizer: ChatTokenizer, rules: Rules
) -> tuple[list[int], list[int]]:
    """Tokens and their mask; a completion is learned to its end, the prompt before it is given."""
    if isinstance(example, ChatExample):
        if example.uses_tools and not rules.has_tools:
            raise ExampleError("the chat template of this model has no place for tools")
        try:
            return tokenizer.encode_training(example.messages, example.tools)
        except ChatTemplateError as error:
            raise ExampleError(f"the chat template refuses the messages: {error}") from error
    prompt, completion = tokenizer.encode(example.prompt), tokenizer.encode(example.completion)
    completion = [*completion, tokenizer.eos_token_id]
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)


def add_line(
    line: bytes | None, tokenizer: ChatTokenizer, rules: Rules, writer: DatasetWriter, report: Report
) -> None:
    """Raises ExampleError where the line is no example that the job can learn from; passes over empty lines."""
    if line is None:
        raise ExampleError(f"longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return
    tokens, mask = encode(parse_example(line), tokenizer, rules)
    report.longest_example = max(report.longest_example, len(tokens))
    if len(tokens) > rules.max_seq_len:
        report.num_too_long += 1
        raise ExampleError(
            f"{len(tokens)} tokens, but max_seq_len is {rules.max_seq_len}; "
            "shorten the example or raise max_seq_len"
        )
    if not any(mask[1:]):
        raise ExampleError("no token to learn from")
    writer.append(tokens, mask)


async def scan(
    chunks: AsyncIterable[bytes], tokenizer: ChatTokenizer, rules: Rules, writer: DatasetWriter
) -> Report:
    report, deadline = Report(), time.monotonic() + rules.budget_s
    async for number, line in read_lines(chunks):
        report.num_lines = number
        try:
            add_line(line, tokenizer, rules, writer, report)
        except ExampleError as error:
            report.add_error(number, str(error))
        reason = why_stop(report, writer, deadline)
        if reason is not None:
            report.add_error(0, f"{reason}; the file was read to line {number}")
            break
    report.num_examples = writer.num_examples
    report.num_tokens = writer.num_tokens
    report.num_trained_tokens = writer.num_trained_tokens
    if report.num_errors == 0 and writer.num_examples == 0:
        report.add_error(0, "the file is empty")
    elif report.num_errors == 0 and writer.num_examples < rules.min_examples:
        report.add_error(
            0, f"the file has {writer.num_examples} examples; at least {rules.min_examples} are needed"
        )
    return report


def why_stop(report: Report, writer: DatasetWriter, deadline: float) -> str | None:
    if report.num_errors >= MAX_ERRORS:
        return f"more than {MAX_ERRORS} errors"
    if report.num_lines > MAX_LINES:
        return f"more than {MAX_LINES} lines"
    if writer.num_tokens > MAX_TOKENS:
        return f"more than {MAX_TOKENS} tokens"
    if time.monotonic() > deadline:
        return "validation takes too long"
    return None


async def validate_file(
    store: ObjectStore, key: str, tokenizer: ChatTokenizer, rules: Rules, spool_dir: Path
) -> Report:
    """Reads the object, and where it is good stores its dataset under its hash.

    The dataset is written anew even where it exists, so that it counts as young to the garbage collection.
    """
    with DatasetWriter(spool_dir) as writer:
        report = await scan(store.stream(key), tokenizer, rules, writer)
        if report.num_errors == 0:
            report.dataset = writer.ref()
            await store.put(report.dataset.key, writer.chunks())
    return report
