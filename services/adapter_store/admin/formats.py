"""Numbers, sizes and times as an operator reads them. Nothing known: an en dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime

NOTHING = "–"
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400


def whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """Three digits and a unit: 12.4k."""
    if value is None:
        return NOTHING
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5 or unit == "B":
            break
        value /= 1000
    return f"{value:.3g}{unit}" if unit else f"{value:.0f}"


def decimal(value: float | None, digits: int = 4) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Without its unit; three digits, but whole from a hundred on."""
    if value is None:
        return NOTHING
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def percent(fraction: float | None, digits: int = 0) -> str:
    return NOTHING if fraction is None else f"{fraction * 100:.{digits}f} %"


def change(before: float | None, after: float | None) -> str:
    """Signed, relative to `before`."""
    if before is None or after is None or before == 0:
        return NOTHING
    return f"{(after - before) / before * 100:+.1f} %".replace("-", "−")


def scientific(value: float | None) -> str:
    """0.0002 -> 2e-4; what reads well as it is stays."""
    if value is None:
        return NOTHING
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """The two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    left = max(0, round(seconds))
    if left < MINUTE_S:
        return f"{left} s"
    if left < HOUR_S:
        return f"{left // MINUTE_S} min {left % MINUTE_S:02d} s"
    if left < DAY_S:
        return f"{left // HOUR_S} h {left % HOUR_S // MINUTE_S:02d} min"
    return f"{left // DAY_S} d {left % DAY_S // HOUR_S} h"


def between(start: datetime | None, end: datetime | None) -> float | None:
    """Seconds; to now where there is no end yet."""
    return None if start is None else ((end or datetime.now(UTC)) - start).total_seconds()


def ago(at: datetime | None) -> str:
    """The largest unit."""
    seconds = between(at, None)
    if seconds is None:
        return NOTHING
    for unit_s, unit in ((DAY_S, "d"), (HOUR_S, "h"), (MINUTE_S, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s:.0f} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds:.0f} s ago"


def stamp(at: datetime | None) -> str:
    return NOTHING if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def short(digest: str | None, length: int = 12) -> str:
    return NOTHING if not digest else digest[:length]


def sparkline(values: list[float], width: int = 88, height: int = 22) -> str:
    """Points of an SVG polyline that fills the box but for the line's own width."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (height - 3) / (high - low) if high > low else 0.0
    step = (width - 2) / (len(values) - 1)
    return " ".join(
        f"{1 + i * step:.1f},{1.5 + (high - value) * scale:.1f}" for i, value in enumerate(values)
    )


FILTERS = {
    function.__name__: function
    for function in (
        whole,
        compact,
        decimal,
        milliseconds,
        percent,
        scientific,
        size,
        duration,
        ago,
        stamp,
        short,
        sparkline,
    )
}
