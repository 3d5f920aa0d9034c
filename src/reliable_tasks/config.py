"""The ``reliable_*`` settings: what each means, its unit and its default."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Self

from reliable_tasks.errors import ConfigError

__all__ = [
    "LONGEST_TTL",
    "REDIS_OPTIONS",
    "UNLIMITED",
    "ReliableConfig",
    "check_count",
    "nearest",
]

PREFIX = "reliable_"

#: What a Redis URL cannot say: the same names as in Celery's transport options, and ``ssl``.
REDIS_OPTIONS = (
    "global_keyprefix",
    "master_name",
    "min_other_sentinels",
    "sentinel_kwargs",
    "ssl",
)

#: How long a task may run that nothing limits: Celery's own default visibility timeout (s).
UNLIMITED = 3600.0

#: The shortest `reliable_lease` (s): a worker that lives says so each second.
SHORTEST_LEASE = 3.0
#: The longest (s).
LONGEST_LEASE = 300.0

#: The longest time that a claim may wait in the queue (s): ten years.
LONGEST_TTL = 10 * 366 * 86400.0
#: The longest time that a dead letter is kept (s): a hundred years. Redis can count so far, and ...
_LONGEST_AGE = 10 * LONGEST_TTL
#: ... so many.
_MOST_LETTERS = 10**12


def _setting(default: Any, doc: str, *, unit: str = "", choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "unit": unit, "choices": choices})


#: Settings that are numbers of something: their least, of what, and whether ``None`` is no bound.
_COUNTS = (
    ("wait_replicas", 0, "replicas", False),
    ("max_crashes", 1, "crashes", True),
    ("max_requeues", 0, "requeues", True),
    ("dead_letter_max_count", 1, "dead letters", False),
    ("dead_letter_max_body", 0, "bytes", False),
)


def check_count(where: str, value: Any, least: int, what: str, *, is_optional: bool) -> None:
    """Refuse what is no number of something.

    Args:
        where: What was set, e.g. ``"reliable_max_crashes"``.
        value: To what.
        least: The least number.
        what: Of what it is a number.
        is_optional: Whether ``None`` stands for no bound.

    Raises:
        ConfigError: It is none.
    """
    if value is None and is_optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        other = ", or None for no bound" if is_optional else ""
        raise ConfigError(f"{where} = {value!r}: give a number of {what}, {least} or more{other}")


def nearest(name: str, known: list[str]) -> str:
    """Say which known name was probably meant.

    Args:
        name: What was written.
        known: The names that exist.

    Returns:
        ``"; did you mean 'x'?"``, or a list of all names when none is close.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(sorted(known))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliableConfig:
    """The library's own settings, read from ``app.conf``.

    In ``app.conf`` each name has the prefix ``reliable_`` (with a namespace, that in front:
    ``CELERY_RELIABLE_REDIS_URL``). An unknown ``reliable_*`` name is an error.
    """

    redis_url: str | None = _setting(
        None,
        "The lock Redis: where `@once` claims live. Left open: the broker if it is a Redis, "
        "else the result backend if it is one.",
    )
    redis_options: Mapping[str, Any] | None = _setting(
        None,
        "How to reach `reliable_redis_url`, as far as the URL cannot say it: `master_name`, "
        "`sentinel_kwargs`, `ssl` (as Celery's `broker_use_ssl`), `global_keyprefix`. Without a "
        "`reliable_redis_url` they are those of the broker or the result backend.",
    )
    key_prefix: str = _setting(
        "reliable:",
        "What every Redis key of this library begins with, behind kombu's `global_keyprefix`.",
    )
    store_timeout: float = _setting(
        5.0,
        "How long one command to the lock Redis may take. One that fails is tried again, unless "
        "it took half of that already.",
        unit="s",
    )
    on_store_error: str = _setting(
        "raise",
        "What a publish does when the lock Redis does not answer: `raise` refuses the call, "
        "`proceed` queues it without a claim and says so in the log. A worker never fails a "
        "task for it: with `raise` it keeps the message and tries again until it answers, "
        "with `proceed` it runs it unguarded.",
        choices=("raise", "proceed"),
    )
    once_ttl: float = _setting(
        3600.0,
        "How long a claim may wait in the queue, on top of its ETA or countdown. "
        "`@once(ttl=...)` sets it for one task.",
        unit="s",
    )
    longest_task: float | None = _setting(
        None,
        "How long the longest task runs that has no hard time limit. Part of "
        "`visibility_timeout`, and how long its claim is held for it without one (left open: an "
        "hour); same as `apply_reliable_config(longest_task=...)`.",
        unit="s",
    )
    longest_countdown: float | None = _setting(
        None,
        "The longest countdown or ETA that callers use. Part of `visibility_timeout`; same as "
        "`apply_reliable_config(longest_countdown=...)`.",
        unit="s",
    )
    broker: str = _setting(
        "reliable",
        "Which transport talks to a broker whose URL is `redis://`, `rediss://` or "
        "`sentinel://`: `reliable`, this library's, or `stock`, kombu's own, with which tasks "
        "can be lost and long ones can run twice.",
        choices=("reliable", "stock"),
    )
    lease: float = _setting(
        15.0,
        "For how long a message is a worker's own without a renewal, 3 to 300 s; a worker "
        "renews each third of it. After a death that no lost connection gives away, its tasks "
        "run again when it has ended. The same for all workers of a Redis database.",
        unit="s",
    )
    death_detection: str = _setting(
        "connection",
        "How a dead worker is known: `connection` takes the word of the Redis that lost its "
        "connection and did not hear of it for two seconds, `lease` waits for its leases to "
        "end. Where connections come through a proxy, it is always `lease`.",
        choices=("connection", "lease"),
    )
    wait_replicas: int = _setting(
        0,
        "How many replicas of the Redis broker must have a message before its publish returns, "
        "and of the lock Redis a `@once` claim before it counts (`WAIT`); a failover then forgets "
        "less. With 0 none is waited for.",
    )
    max_crashes: int | None = _setting(
        3,
        "How many times a task may crash: be started, and take its pool child or its worker with "
        "it. Then it ends as `FAILURE` with `PoisonPill`. `max_crashes=` of a task sets it for "
        "that one; with `None` nothing stops it.",
    )
    max_requeues: int | None = _setting(
        100,
        "How many times a task may put itself back into its queue, by `Reject(requeue=True)` or "
        "with `acks_on_timeout=False`. Then it ends as `FAILURE` with `RequeuesExhausted`. "
        "`max_requeues=` of a task sets it for that one; with `None` nothing stops it.",
    )
    dead_letter: bool | str | Collection[str] | Mapping[str, bool] = _setting(
        True,
        "Which tasks become dead letters: `True`, those that end for one of the causes that are "
        "kept by default; `False`, none; or some causes by name, in a collection, or in a mapping "
        "with `True` or `False` for each that is not as by default. `dead_letter=` of a task sets "
        "it for that one.",
    )
    dead_letter_max_age: float = _setting(
        90 * 86400.0,
        "How long a dead letter is kept.",
        unit="s",
    )
    dead_letter_max_count: int = _setting(
        100_000,
        "How many dead letters are kept. Beyond it the oldest is dropped; from four fifths of it "
        "on a worker warns.",
    )
    dead_letter_max_body: int = _setting(
        1_000_000,
        "How large a message is kept (bytes). Of a larger one all is kept but the message, so "
        "that it cannot be replayed.",
    )
    dead_letter_exchange: bool = _setting(
        True,
        "Whether quorum queues of RabbitMQ are declared with a dead-letter exchange, "
        "`reliable.dead`, and a delivery limit of 1000: what RabbitMQ itself would drop is kept in "
        "the queue of that name. The same for all workers and producers; RabbitMQ refuses a queue "
        "that exists without.",
    )
    dead_letter_redact: str | Callable[[Any], Any] | None = _setting(  # noqa: RUF009 - as the others
        None,
        "A function, or its name as `module:function`, that takes a `DeadLetter` before it is kept "
        "and returns it without what must not be read: its `argsrepr`, `kwargsrepr`, `error`, "
        "`traceback` and `claim`. The message itself is kept whole.",
    )
    visibility_margin: float = _setting(
        10.0,
        "What `visibility_timeout` adds to the longest task: room for the hard limit's kill, "
        "the sweep and the difference between the clocks of your hosts.",
        unit="s",
    )

    def __post_init__(self) -> None:
        for name, may_be_zero in (
            ("store_timeout", False),
            ("once_ttl", False),
            ("longest_task", False),
            ("longest_countdown", True),
            ("visibility_margin", True),
            ("lease", False),
            ("dead_letter_max_age", False),
        ):
            value = getattr(self, name)
            if value is None and name.startswith("longest_"):
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not (0 < value < inf or (may_be_zero and value == 0)):
                least = "0 or more" if may_be_zero else "more than 0"
                raise ConfigError(f"reliable_{name} = {value!r}: give a number of seconds, {least}")
        for name, longest, years in (
            ("once_ttl", LONGEST_TTL, "ten"),
            ("dead_letter_max_age", _LONGEST_AGE, "a hundred"),
        ):
            if getattr(self, name) > longest:
                raise ConfigError(
                    f"reliable_{name} = {getattr(self, name)!r}: give at most {longest:.0f} "
                    f"seconds, which are {years} years"
                )
        if self.lease > LONGEST_LEASE:
            raise ConfigError(
                f"reliable_lease = {self.lease!r}: give at most {LONGEST_LEASE:g} seconds, or a "
                "dead worker's tasks would wait that long; it is renewed while the worker lives"
            )
        if self.lease < SHORTEST_LEASE:
            raise ConfigError(
                f"reliable_lease = {self.lease!r}: give at least {SHORTEST_LEASE:g} seconds, or "
                "a worker that is busy for a moment would lose what it runs"
            )
        for name, fewest, what, is_optional in _COUNTS:
            check_count(
                f"reliable_{name}", getattr(self, name), fewest, what, is_optional=is_optional
            )
        if self.dead_letter_max_count > _MOST_LETTERS:
            raise ConfigError(
                f"reliable_dead_letter_max_count = {self.dead_letter_max_count!r}: give at most "
                f"{_MOST_LETTERS}"
            )
        for name in self.redis_options or {}:
            if name not in REDIS_OPTIONS:
                raise ConfigError(
                    f"reliable_redis_options[{name!r}]" + nearest(name, list(REDIS_OPTIONS))
                )
        for setting in fields(self):
            choices = setting.metadata["choices"]
            value = getattr(self, setting.name)
            if choices and value not in choices:
                raise ConfigError(
                    f"reliable_{setting.name} = {value!r}" + nearest(str(value), list(choices))
                )
        if set(str(self.key_prefix)) & set("{}"):
            raise ConfigError(
                f"reliable_key_prefix = {self.key_prefix!r}: give a text without braces, "
                "which Redis Cluster would take for a hash tag"
            )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build from settings as they stand in ``app.conf``.

        Args:
            settings: ``reliable_*`` names in lower case, and their values.

        Raises:
            ConfigError: A name is unknown (the nearest is named) or a value is no good.
        """
        known = [setting.name for setting in fields(cls)]
        values = {}
        for name, value in settings.items():
            bare = name.removeprefix(PREFIX)
            if bare not in known:
                raise ConfigError(
                    f"unknown setting {name!r}" + nearest(name, [PREFIX + k for k in known])
                )
            values[bare] = value
        return cls(**values)
