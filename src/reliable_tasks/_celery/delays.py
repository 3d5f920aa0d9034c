"""Delays of less than a second."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery

__all__ = ["delay_of", "with_short_delay"]


def delay_of(app: Celery, options: Mapping[str, Any]) -> float:
    """Return the seconds until a call's task may start, from ``countdown`` or ``eta``."""
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown:
        return max(float(countdown), 0.0)
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if not isinstance(eta, datetime):
        return 0.0
    if eta.tzinfo is None:
        eta = eta.replace(tzinfo=app.timezone)
    return max((eta - datetime.now(UTC)).total_seconds(), 0.0)


def with_short_delay(app: Celery, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call's options with a delay of less than a second put where it works.

    With native delayed delivery Celery cuts a countdown to whole seconds and refuses the 0 that
    is left. As the header that Celery makes of it anyway, it reaches the worker, which waits.
    """
    delay = delay_of(app, options)
    if not 0 < delay < 1:
        return options
    eta = (datetime.now(UTC) + timedelta(seconds=delay)).isoformat()
    rest = {name: value for name, value in options.items() if name not in ("countdown", "eta")}
    return {**rest, "headers": {**(options.get("headers") or {}), "eta": eta}}
