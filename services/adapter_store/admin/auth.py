"""Who is at the console: one operator, known by a password, kept by a signed cookie.

Nothing is stored: a session is a random id, its kind and its time under a key made from the session secret
and the password, so that a changed password ends every session. Forms carry a token made from the id.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from itsdangerous import BadSignature, TimestampSigner
from pydantic import SecretStr

from shared.config import Settings

SESSION_TTL_S = 12 * 3600
OPERATOR, VISITOR = "operator", "visitor"


@dataclass(frozen=True, slots=True)
class Session:
    """A visitor has one too: the login form needs its token."""

    id: str
    is_operator: bool


class Gate:
    """Checks passwords, signs and reads sessions. Raises ValueError without a password or a secret."""

    def __init__(self, settings: Settings) -> None:
        password = required(settings.admin_password, "admin_password")
        secret = required(settings.session_secret, "session_secret")
        self._key = hmac.digest(secret, b"flexllm admin " + password, hashlib.sha256)
        self._password_mac = self._mac(password)
        self._signer = TimestampSigner(self._key, salt="session", digest_method=hashlib.sha256)
        self._ended: dict[str, float] = {}  # signed out before their time -> when to forget that

    def is_password(self, attempt: str) -> bool:
        return hmac.compare_digest(self._password_mac, self._mac(attempt.encode()))

    def seal(self, session: Session) -> str:
        """The cookie's value."""
        kind = OPERATOR if session.is_operator else VISITOR
        return self._signer.sign(f"{kind}.{session.id}").decode()

    def open(self, cookie: str | None) -> Session | None:
        """The session of a cookie that we signed within `SESSION_TTL_S` and did not end."""
        try:
            value = self._signer.unsign(cookie or "", max_age=SESSION_TTL_S).decode()
        except BadSignature:
            return None
        kind, _, session_id = value.partition(".")
        if session_id in self._ended:
            return None
        return Session(session_id, is_operator=kind == OPERATOR)

    def end(self, session: Session) -> None:
        now = time.monotonic()
        self._ended = {id_: until for id_, until in self._ended.items() if until > now}
        self._ended[session.id] = now + SESSION_TTL_S

    def csrf_token(self, session: Session) -> str:
        return self._mac(b"csrf " + session.id.encode()).hex()

    def is_csrf_token(self, session: Session, token: str) -> bool:
        return hmac.compare_digest(self.csrf_token(session).encode(), token.encode())

    def derive_key(self, purpose: str) -> bytes:
        """For what else the console signs."""
        return self._mac(b"key " + purpose.encode())

    def _mac(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, hashlib.sha256)


def required(secret: SecretStr, name: str) -> bytes:
    value = secret.get_secret_value()
    if not value:
        raise ValueError(f"{name} is empty: set FLEXLLM_{name.upper()}; the admin UI has no default")
    return value.encode()


def new_session(*, is_operator: bool) -> Session:
    return Session(secrets.token_urlsafe(18), is_operator)


class Throttle:
    """Counts failures of an address: after `limit` of them it waits until the oldest is `window_s` old."""

    def __init__(self, limit: int = 5, window_s: float = 300.0, max_addresses: int = 10_000) -> None:
        self._limit = limit
        self._window_s = window_s
        self._max_addresses = max_addresses
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """0 where the address may try now."""
        since = time.monotonic() - self._window_s
        recent = [at for at in self._failures.get(network_of(address), []) if at > since]
        return recent[-self._limit] - since if len(recent) >= self._limit else 0.0

    def note_failure(self, address: str) -> None:
        key = network_of(address)
        failures = self._failures.setdefault(key, [])
        failures[:] = [*failures[-self._limit :], time.monotonic()]
        self._failures.move_to_end(key)
        if len(self._failures) > self._max_addresses:
            self._failures.popitem(last=False)

    def forget(self, address: str) -> None:
        self._failures.pop(network_of(address), None)


def network_of(address: str) -> str:
    """Whoever has one IPv6 address has its whole /64."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    return str(int(parsed) >> 64) if isinstance(parsed, IPv6Address) else str(parsed)
