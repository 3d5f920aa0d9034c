"""celery-once's names on this library's machinery: change the import, and keep the rest.

::

    from reliable_tasks.contrib.celery_once import AlreadyQueued, QueueOnce

``app.conf.ONCE``, ``once={...}`` on tasks and calls, keys, return values and errors are as users
know them. Locks lie under celery-once's own keys, so that its producers and workers and this
library's respect each other's during a rolling upgrade.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import uuid4
from weakref import WeakKeyDictionary

import redis
from celery import Celery, Task, states
from celery.result import EagerResult

from reliable_tasks._once.locks import Locks, build_locks
from reliable_tasks._once.once import Once
from reliable_tasks._once.options import OnceOptions
from reliable_tasks._places import read_config
from reliable_tasks._task import ReliableTask
from reliable_tasks.config import LONGEST_TTL, ReliableConfig, nearest
from reliable_tasks.contrib._shared_claims import SharedClaims
from reliable_tasks.errors import ConfigError, DuplicateTaskError, StoreUnavailable

try:
    from celery_once import AlreadyQueued as _AlreadyQueued
except ImportError:
    _AlreadyQueued = Exception

__all__ = ["AlreadyQueued", "LocksUnavailable", "QueueOnce"]

_REDIS = "celery_once.backends.Redis"
#: The same class, by the name of its module.
_REDIS_TOO = "celery_once.backends.redis.Redis"
_DEFAULT_URL = "redis://localhost:6379/0"
_DEFAULT_TIMEOUT = 3600
#: celery-once takes 0 for a lock that never lapses. Ours do, for a task can be forgotten.
_NEVER = 366 * 86400
#: How often a call tries again that waits for its lock (s): as redis-py's ``Lock`` does.
_BETWEEN_TRIES = 0.1
_OF_TASK = ("graceful", "unlock_before_run", "timeout", "keys")
_OF_CALL = ("graceful", "timeout", "keys")
#: What celery-once asks a task for, and this library reads where it is set.
_NOT_OVERRIDDEN = {
    "default_timeout": "once={'timeout': ...}",
    "unlock_before_run": "once={'unlock_before_run': ...}",
}


class AlreadyQueued(DuplicateTaskError, _AlreadyQueued):  # type: ignore[misc]
    """A task with this key is queued or running already.

    ``except celery_once.AlreadyQueued`` catches it too, where celery-once is installed.

    Attributes:
        countdown: Seconds until its lock lapses if nobody renews or releases it.
        message: celery-once's text.
        key: The key.
        owner: Id of the task that has it, or ``"celery-once"`` if it was called without this
            library.
        expires_in: As ``countdown``.
    """

    def __init__(self, countdown: float, key: str = "", owner: str = "") -> None:
        # Not through super(): the two that it comes from take different arguments.
        Exception.__init__(self, countdown, key, owner)
        self.key = key
        self.owner = owner
        self.expires_in = self.countdown = countdown
        self.message = f"Expires in {countdown} seconds"

    def __str__(self) -> str:
        return super().__str__() if self.owner else self.message


class LocksUnavailable(StoreUnavailable, redis.exceptions.ConnectionError):
    """The Redis of the locks does not answer.

    ``except redis.exceptions.ConnectionError`` catches it, as it does with celery-once.
    """


@dataclass(frozen=True, slots=True)
class _Locks(Locks):
    """The locks of ``app.conf.ONCE``."""

    def unavailable(self, error: StoreUnavailable) -> StoreUnavailable:
        """Return the error as celery-once's users know it."""
        return LocksUnavailable(error.url, error.reason)


class _LocksOfTask:
    """What celery-once calls its backend: the locks by hand."""

    def __init__(self, task: QueueOnce) -> None:
        self._app = task.app
        self._locks = _locks_of(task.app)
        self._claims = cast(SharedClaims, self._locks.claims)

    @property
    def redis(self) -> redis.Redis:
        """The client of the locks' Redis."""
        return self._claims.client.redis

    def raise_or_lock(self, key: str, timeout: float) -> None:
        """Lock a key, or raise `AlreadyQueued`; with ``blocking`` wait for it first."""
        until = time.monotonic() + _longest_wait(self._app)
        # As celery-once's own: it belongs to the message that is sent with no claim of ours.
        token = str(uuid4())
        with self._told():
            while True:
                seconds = self._claims.lock(key, token=token, ttl=timeout or _NEVER)
                if seconds is None:
                    return
                if time.monotonic() >= until:
                    raise AlreadyQueued(seconds, key)
                time.sleep(_BETWEEN_TRIES)

    def clear_lock(self, key: str) -> int:
        """Free a key, whoever has it: a task that runs loses its claim. Return how many it was."""
        with self._told():
            return self._claims.delete(key)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable as error:
            raise self._locks.unavailable(error) from error


class _QueueOnce(Once):
    """What ``once={...}`` says, on a task or on one of its calls.

    Args:
        task: The task, or its class.
        app: Its app.
        of_call: What only a call knows.
    """

    #: What celery-once has queued must run: nobody was told that it is a duplicate.
    waits_if_late = True
    #: A call from a task's own body is refused, as any other is while it runs.
    hands_on = False

    def __init__(self, task: Any, app: Celery, of_call: Mapping[str, Any] | None = None) -> None:
        _check(task.once, _OF_TASK, f"{task.name}: once={task.once!r}")
        _check(of_call or {}, _OF_CALL, f"a call of {task.name}: once={of_call!r}")
        wish = {**task.once, **(of_call or {})}
        options = OnceOptions(
            lock="until_executing" if wish.get("unlock_before_run") else "until_executed",
            on_conflict="existing" if wish.get("graceful") else "raise",
            ttl=min(wish["timeout"] or _NEVER, LONGEST_TTL) if "timeout" in wish else None,
        )
        body = getattr(task.run, "__wrapped__", task.run)
        super().__init__(options, body, takes_self=False, task=task.name)
        self._app = app
        self._of_call = of_call or {}

    def claim_name(self, task: Task[..., Any], args: Any, kwargs: Mapping[str, Any] | None) -> str:
        """Return the key of a call."""
        named = cast(QueueOnce, task)
        if "keys" in self._of_call:
            return _key(named, args, kwargs, self._of_call["keys"])
        return named.get_key(args, kwargs)

    def locks(self, task: Task[..., Any]) -> Locks:
        """Return the locks in the Redis of ``app.conf.ONCE``."""
        return _locks_of(self._app)

    def adopt(
        self, task: Task[..., Any], locks: Locks, name: str, *, owner: str, attempt: int
    ) -> None:
        """Take over the lock that celery-once has taken for a message."""
        cast(SharedClaims, locks.claims).adopt(name, owner=owner, attempt=attempt, task=task.name)

    def refusal(self, name: str, owner: str, seconds: float) -> DuplicateTaskError:
        """Return the error of a call whose key is taken."""
        # A lock lives on while its task runs; who waits for it is told what he knows.
        return AlreadyQueued(min(seconds, self.ttl(read_config(self._app))), name, owner)

    def ttl(self, config: ReliableConfig) -> float:
        """Return how long a lock may wait in the queue (s)."""
        return self.options.ttl_seconds(_default_timeout(self._app))


class QueueOnce(ReliableTask):
    """celery-once's ``QueueOnce``: a `ReliableTask` whose call raises if it is queued already.

    Attributes:
        once: ``graceful``: a duplicate returns an ``EagerResult`` in state ``REJECTED`` rather
            than raise. ``unlock_before_run``: its key is free when it starts. ``timeout``: how
            long it may wait in the queue (s), on top of its countdown; default: that of
            ``app.conf.ONCE``, or 3600. ``keys``: the arguments that count; default: all.
    """

    abstract = True
    once: ClassVar[dict[str, Any]] = {"graceful": False, "unlock_before_run": False}

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Take the settings of an app. Celery calls it.

        Raises:
            ConfigError: ``once`` has an unknown option, or there is an ``@once`` beside it.
        """
        bound = super().bind(app)
        if cls.reliable_once is not None and not isinstance(cls.reliable_once, _QueueOnce):
            raise ConfigError(f"{cls.name} has @once and the base QueueOnce: keep one of them")
        for name, instead in _NOT_OVERRIDDEN.items():
            if getattr(cls, name) is not getattr(QueueOnce, name):
                raise ConfigError(f"{cls.name} overrides QueueOnce.{name}: set {instead} instead")
        cls.reliable_once = _QueueOnce(cls, app)
        return bound

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Queue the task; takes what Celery's `apply_async` takes, and ``once={...}``.

        Returns:
            The result; for a duplicate that is ``graceful`` an ``EagerResult`` without an id, in
            state ``REJECTED``.

        Raises:
            AlreadyQueued: A task with the key is queued or running.
        """
        until = time.monotonic() + _longest_wait(self.app)
        while True:
            refused: AlreadyQueued | None = None
            try:
                result = super().apply_async(*args, **options)
            except AlreadyQueued as error:
                refused = error
            else:
                # One that follows another task was queued, for somebody waits for it.
                if not result.duplicate or result.followed_id is not None:
                    return result
            if time.monotonic() >= until:
                break
            time.sleep(_BETWEEN_TRIES)
        if refused is not None:
            raise refused
        return _rejected()

    def apply_many(self, *args: Any, **options: Any) -> list[Any]:
        """Queue the task many times; takes what `ReliableTask.apply_many` takes.

        Returns:
            The results; for a duplicate, whether or not it is ``graceful``, that of one that is.
            None of them waits for a lock.
        """
        return [
            _rejected() if result.duplicate and result.followed_id is None else result
            for result in super().apply_many(*args, **options)
        ]

    def get_key(self, args: Any = None, kwargs: Mapping[str, Any] | None = None) -> str:
        """Return the key of a call, as celery-once makes it."""
        return _key(self, args, kwargs, self.once.get("keys"))

    def unlock_before_run(self) -> bool:
        """Say whether the key is free when the task starts."""
        return bool(self.once.get("unlock_before_run", False))

    @property
    def config(self) -> Any:
        """The app's settings."""
        return self.app.conf

    @property
    def once_config(self) -> Any:
        """``app.conf.ONCE``."""
        return self.app.conf.ONCE

    @property
    def once_backend(self) -> _LocksOfTask:
        """The locks by hand: ``raise_or_lock(key, timeout)`` and ``clear_lock(key)``."""
        return _LocksOfTask(self)

    @property
    def default_timeout(self) -> float:
        """How long a lock may wait in the queue if nobody says (s)."""
        return _default_timeout(self.app)

    def _take_once(self, options: dict[str, Any]) -> Once | None:
        of_call = options.pop("once", None)
        return self.reliable_once if not of_call else _QueueOnce(self, self.app, of_call)


def _rejected() -> Any:
    """Return what celery-once answers a duplicate that is graceful."""
    rejected: Any = EagerResult(None, None, states.REJECTED)  # type: ignore[arg-type]
    rejected.duplicate = True
    rejected.followed_id = rejected.replaced_id = rejected.ignored_id = None
    return rejected


def _longest_wait(app: Celery) -> float:
    """Return for how long a call waits for its lock (s)."""
    settings = _settings(app)
    if not settings.get("blocking"):
        return 0.0
    seconds = settings.get("blocking_timeout", 1)
    return inf if seconds is None else float(seconds)


def _key(task: QueueOnce, args: Any, kwargs: Mapping[str, Any] | None, keys: Any) -> str:
    # Of the class, for autoretry_for and tools that watch tasks wrap the one of the task.
    run = type(task).run.__get__(task)
    bound = inspect.signature(run).bind(*(args or ()), **(kwargs or {}))
    arguments = dict(bound.arguments)
    if keys is not None:
        # Where celery-once would not find one that was left out.
        bound.apply_defaults()
        for name in keys:
            if name not in bound.arguments:
                known = nearest(str(name), list(bound.arguments))
                raise ConfigError(f"{task.name}: once={{'keys': {keys!r}}}: {name!r}{known}")
        arguments = {name: bound.arguments[name] for name in keys}
    parts = [f"{name}-{_plain(value)}" for name, value in sorted(arguments.items())]
    return "_".join(["qo", task.name, *parts])


def _plain(value: Any) -> Any:
    """Return what celery-once makes the text of a key of (``celery_once.helpers.force_string``)."""
    if isinstance(value, dict):
        items = (
            str({_plain(key): _plain(item)}).strip("{}") for key, item in sorted(value.items())
        )
        return f"{{{', '.join(items)}}}"
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: {name!r}" + nearest(str(name), list(known)))


def _settings(app: Celery) -> Mapping[str, Any]:
    once = app.conf.get("ONCE")
    if not isinstance(once, Mapping) or not isinstance(once.get("settings"), Mapping):
        raise ConfigError(
            f"app.conf.ONCE is {once!r}: set {{'backend': {_REDIS!r}, 'settings': {{'url': ...}}}}"
        )
    if once.get("backend", _REDIS) not in (_REDIS, _REDIS_TOO):
        raise ConfigError(
            f"app.conf.ONCE: the backend {once['backend']!r} is none of this library's, which "
            f"keeps its locks in Redis: {_REDIS!r}"
        )
    return cast(Mapping[str, Any], once["settings"])


def _default_timeout(app: Celery) -> float:
    return float(_settings(app).get("default_timeout", _DEFAULT_TIMEOUT) or _NEVER)


def _with_tls(url: str) -> str:
    """Bring ``redis://...?ssl=true`` to what others write ``rediss://``."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme != "redis" or query.pop("ssl", "").lower() != "true":
        return url
    return urlunsplit(parts._replace(scheme="rediss", query=urlencode(query)))


#: Built once per configuration and URL: every publish asks.
_locks: WeakKeyDictionary[Celery, tuple[Any, str, Locks]] = WeakKeyDictionary()


def _locks_of(app: Celery) -> Locks:
    url = _with_tls(str(_settings(app).get("url") or _DEFAULT_URL))
    known = _locks.get(app)
    if known is None or known[0] is not app.conf or known[1] != url:
        config = replace(read_config(app), redis_url=url, redis_options=None)
        built = build_locks(app, config, SharedClaims)
        # Each claim is a step of its own: the broker's script knows nothing of these keys.
        locks = _Locks(built.claims, config, built.are_at_broker, are_made_by_broker=False)
        known = _locks[app] = (app.conf, url, locks)
    return known[2]
