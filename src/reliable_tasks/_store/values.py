"""How values look on their way to Redis and back."""

from __future__ import annotations

from typing import Any

__all__ = ["ms", "text"]


def ms(seconds: float) -> int:
    """Return whole milliseconds, in which scripts count."""
    return round(seconds * 1000)


def text(value: Any) -> str:
    """Return a reply as text, whether or not the client decodes it."""
    return value.decode() if isinstance(value, bytes) else str(value)
