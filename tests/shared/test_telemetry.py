"""What stands in the logs, and what may not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from shared.telemetry import configure_logs


@pytest.fixture(autouse=True)
def configuration_of_this_test_alone() -> Iterator[None]:
    """The test's standard error is closed after it; nobody may log there later."""
    yield
    structlog.reset_defaults()


def fail_with(prompt: str) -> None:
    words = prompt.split()
    raise ValueError(f"{len(words)} words are too many")


def test_a_traceback_shows_the_place_but_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    prompt = " ".join(["my", "pri" + "vate", "prompt"])  # the line of the call stands in the traceback
    try:
        fail_with(prompt)
    except ValueError:
        structlog.get_logger().exception("request_failed", request_id="req_1")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["request_id"]) == ("request_failed", "error", "req_1")
    assert "in fail_with" in line["exception"]
    assert "3 words are too many" in line["exception"]
    assert "private" not in line["exception"]


def test_a_line_break_in_a_value_does_not_begin_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    structlog.get_logger().info("named", name='a\n{"event": "forged"}\r')
    assert len(capsys.readouterr().err.splitlines()) == 1
