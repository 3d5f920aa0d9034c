"""Time limits, rate limits and retries, ready made.

A preset is an immutable mapping of task options: ``**`` spreads it, ``|`` merges it::

    @app.task(base=ReliableTask, **presets.STANDARD)
    def send_invoice(invoice_id): ...

    @app.task(base=ReliableTask, **(presets.LONG | presets.rate_limit("10/m")))
    def import_catalogue(url): ...

=============  ==========  ==========  ===========================================  =========
preset         soft limit  hard limit  retries: attempts, full jitter up to         expires
=============  ==========  ==========  ===========================================  =========
``QUICK``      10 s        15 s        3 attempts, 1 s doubling up to 10 s          1 h
``STANDARD``   4 min       5 min       5 attempts, 2 s doubling up to 2 min         never
``LONG``       55 min      1 h         5 attempts, 10 s doubling up to 10 min       never
``BATCH``      5 h 50 min  6 h         3 attempts, 60 s doubling up to 30 min       never
=============  ==========  ==========  ===========================================  =========

A soft limit raises ``SoftTimeLimitExceeded`` in the task, so that it can clean up; the hard one
kills it. Retries are tenacity's ``wait_random_exponential``: each wait is drawn between 0 and
the doubling bound, so that a crowd of failed tasks does not come back as a crowd (`full jitter`_).

.. _full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

import tenacity
from celery.utils.time import rate

from reliable_tasks.errors import ConfigError

__all__ = ["BATCH", "LONG", "QUICK", "STANDARD", "Preset", "rate_limit", "time_limit"]

_UNITS = {"s": 1, "m": 60, "h": 3600}

if TYPE_CHECKING:
    # For a type checker a preset is the keyword arguments that it spreads into.
    class Preset(TypedDict, total=False):
        """Task options."""

        time_limit: int
        soft_time_limit: int
        expires: float
        rate_limit: str
        retrying: tenacity.Retrying

else:

    class Preset(Mapping):
        """Task options that do not change."""

        __slots__ = ("_options",)

        def __init__(self, **options: Any) -> None:
            self._options = MappingProxyType(options)

        def __getitem__(self, name: str) -> Any:
            return self._options[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self._options)

        def __len__(self) -> int:
            return len(self._options)

        def __or__(self, other: Mapping[str, Any]) -> Preset:
            return Preset(**{**self, **other})

        def __ror__(self, other: Mapping[str, Any]) -> Preset:
            return Preset(**{**other, **self})

        def __reduce__(self) -> tuple[Any, ...]:
            return _preset, (dict(self),)

        def __repr__(self) -> str:
            options = ", ".join(f"{name}={value!r}" for name, value in self.items())
            return f"Preset({options})"


def _preset(options: Any) -> Any:
    make: Any = Preset
    return make(**options)


def time_limit(*, hard: int, soft: int | None = None) -> Preset:
    """Limit how long a task may run.

    Args:
        hard: Seconds after which it is killed (prefork; other pools do not enforce it).
        soft: Seconds after which ``SoftTimeLimitExceeded`` is raised in it. Default: a tenth
            less than ``hard``, at least a second before it; none for a ``hard`` of 1.

    Raises:
        ConfigError: A limit is not a positive number, or the soft one is not below the hard one.
    """
    for name, value in (("hard", hard), ("soft", soft)):
        if value is None and name == "soft":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
            raise ConfigError(f"{name} = {value!r}: give a number of seconds, more than 0")
    if soft is None:
        soft = max(min(int(hard * 0.9), int(hard) - 1), 0) or None
    if soft is None:
        return Preset(time_limit=hard)
    if soft >= hard:
        raise ConfigError(
            f"soft = {soft!r} is not below hard = {hard!r}: the task would be killed before it "
            "could clean up"
        )
    return Preset(time_limit=hard, soft_time_limit=soft)


def rate_limit(limit: str) -> Preset:
    """Limit how often a task starts, per worker process: Celery's ``rate_limit``.

    Args:
        limit: ``"100/s"``, ``"10/m"`` or ``"3/h"``; each worker counts for itself.

    Raises:
        ConfigError: The limit cannot be read, or is not more than 0.
    """
    count, _, unit = str(limit).partition("/")
    if unit in _UNITS:
        try:
            if 0 < rate(limit) < float("inf") and float(count) > 0:
                return Preset(rate_limit=limit)
        except ValueError:
            pass
    raise ConfigError(f"{limit!r} is not a rate: write '100/s', '10/m' or '3/h'")


def _retries(attempts: int, *, first: float, longest: float) -> tenacity.Retrying:
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=first, max=longest),
        retry=tenacity.retry_if_exception_type(Exception),
    )


#: For what a user waits for: seconds, few retries, worthless after an hour.
QUICK: Preset = Preset(
    time_limit=15, soft_time_limit=10, expires=3600.0, retrying=_retries(3, first=1, longest=10)
)
#: For most tasks: minutes.
STANDARD: Preset = Preset(
    time_limit=300, soft_time_limit=240, retrying=_retries(5, first=2, longest=120)
)
#: For imports, exports and reports: up to an hour.
LONG: Preset = Preset(
    time_limit=3600, soft_time_limit=3300, retrying=_retries(5, first=10, longest=600)
)
#: For nightly work: up to six hours.
BATCH: Preset = Preset(
    time_limit=21600, soft_time_limit=21000, retrying=_retries(3, first=60, longest=1800)
)
