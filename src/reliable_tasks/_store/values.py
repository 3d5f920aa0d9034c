"""How values look on their way to Redis and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["ms", "pairs", "text"]


def ms(seconds: float) -> int:
    """Return whole milliseconds, in which scripts count."""
    return round(seconds * 1000)


def text(value: Any) -> str:
    """Return a reply as text, whether or not the client decodes it."""
    return value.decode() if isinstance(value, bytes) else str(value)


def pairs(found: Any) -> Iterator[tuple[str, float]]:
    """Read members and scores, which redis-py gives as pairs or as one flat list."""
    rows = list(found)
    if rows and not isinstance(rows[0], (tuple, list)):
        rows = list(zip(rows[::2], rows[1::2], strict=True))
    for name, score in rows:
        yield text(name), float(score)
