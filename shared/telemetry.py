"""Logs: one JSON object a line on standard error, ids and sizes, never prompts, completions or keys."""

from __future__ import annotations

import sys

import structlog


def configure_logs() -> None:
    """To be called once, first thing, by the entry point of every process.

    Tracebacks carry no local variables, which may hold what customers wrote; JSON keeps a line break in a
    value from looking like the next line.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
