"""Identifiers that customers see: a prefix that says what the thing is, and 96 random bits."""

from __future__ import annotations

import re
import secrets
import uuid
from typing import Literal

Prefix = Literal["file-", "ftjob-", "ftevent-", "ftckpt_", "adpt_", "ver_"]

ADAPTER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def new_id(prefix: Prefix) -> str:
    return prefix + secrets.token_hex(12)


def new_uuid() -> str:
    return str(uuid.uuid4())


def is_adapter_name(name: str) -> bool:
    """Names never become paths, and still may not look like one."""
    return ADAPTER_NAME.fullmatch(name) is not None and ".." not in name


def adapter_name_of(suffix: str) -> str:
    """The adapter a customer's free-form suffix names: lower case, other characters become hyphens.

    Raises ValueError when nothing is left.
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", suffix.lower())
    name = re.sub(r"\.{2,}", ".", name).strip("-._")[:63]
    if not is_adapter_name(name):
        raise ValueError(f"suffix {suffix!r} has no letter or digit to make an adapter name from")
    return name
