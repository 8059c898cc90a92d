"""Errors of those who run FlexLLM, as opposed to those who call it."""

from __future__ import annotations


class OperatorError(RuntimeError):
    """Something that whoever started the command can put right; it is printed without a traceback."""
