"""`ReliableTask`: Celery's task, with the promise of this library."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from celery import Celery, Task, chord, group
from celery.exceptions import Ignore, Reject, Retry
from celery.result import EagerResult
from kombu.exceptions import OperationalError

from reliable_tasks._asked import AskedTask
from reliable_tasks._body import WRAPPED, guarded
from reliable_tasks._broker import listeners
from reliable_tasks._broker.beside import note_done
from reliable_tasks._broker.continuing import check_held, continuing, note_continued
from reliable_tasks._celery.budgets import condemned
from reliable_tasks._celery.counts import carried_count, give_count
from reliable_tasks._celery.delays import with_short_delay
from reliable_tasks._celery.delivery import remember_consumer
from reliable_tasks._celery.headers import FIRST_FAILED, OF_ONE_COPY, without_brokers_own
from reliable_tasks._celery.setting_aside import SetAside
from reliable_tasks._celery.settings import explicit
from reliable_tasks._celery.versions import check_versions
from reliable_tasks._dead.keeping import tell_set_apart
from reliable_tasks._dead.options import DeadLetterOption, read_options
from reliable_tasks._once.batch import publish_many, queue_many
from reliable_tasks._once.call import Call
from reliable_tasks._once.claim import CLAIM, OF_ONE_DELIVERY, Claim, Run
from reliable_tasks._once.decorator import OPTIONS, once_options
from reliable_tasks._once.following import is_follower
from reliable_tasks._once.held import HeldClaim, held_claim
from reliable_tasks._once.lineage import lineage_headers, note_end
from reliable_tasks._once.locks import locks_of
from reliable_tasks._once.once import Once
from reliable_tasks._once.options import OnceOptions
from reliable_tasks._once.publish import publish
from reliable_tasks._once.purged import free_thrown
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._places import read_config
from reliable_tasks._retrying import Policy, Retrying
from reliable_tasks._store.publication import Superseded
from reliable_tasks.errors import ConfigError, DuplicateTaskError, LockLost, StoreError

__all__ = ["ReliableTask"]

logger = logging.getLogger("reliable_tasks")

#: How a reliable task differs from Celery's defaults where neither task nor app says otherwise.
#: Acks on failure and on timeout stay on, as in Celery: a failure is a result that was stored, so
#: its message has done its work. Off, a timed-out task runs for ever, and a failed one is gone.
_DEFAULTS: tuple[tuple[str, str, bool], ...] = (
    ("acks_late", "task_acks_late", True),
    ("reject_on_worker_lost", "task_reject_on_worker_lost", True),
    ("track_started", "task_track_started", True),
    # It waits 180 s, spends the retry count and does not exist on 5.6.
    ("retry_on_worker_lost", "task_retry_on_worker_lost", False),
)
#: Options of a call whose end something else waits for.
_CANVAS = ("chain", "chord", "group_id")
#: A task whose retry could not be published runs again after a pause: the first, the longest (s).
_AFTER_FAILED_RETRY = (1.0, 30.0)

listeners.thrown.add(free_thrown)
listeners.set_apart.add(tell_set_apart)


class ReliableTask(AskedTask):
    """A task that is not lost, not run twice at once and not stuck.

    Use it as ``@app.task(base=ReliableTask)``, for all tasks of an app with
    ``Celery(task_cls=ReliableTask)``, or as the base of a class of your own.

    Late acks, reject on worker lost and track started are on; an explicit value of yours, on
    the task or in ``app.conf``, wins. Without `@once` and without ``retrying`` it costs nothing
    at run time.

    Attributes:
        retrying: When and how the task is retried: ``tenacity.Retrying(...)``, one of
            tenacity's ``stop_*``, ``wait_*`` and ``retry_if_*`` objects, or several of them.
            What is left out is as in tenacity: no stop, no wait, any exception. The wait is
            spent in the broker. ``autoretry_for`` beside it is an error.
        exclusive: Whether the task dies, with its pool child, before others may run it: when its
            worker is stopped or cut off from the broker for as long as ``reliable_lease``. For
            prefork workers on a Redis broker; another worker refuses to start.
        max_crashes: How many times the task may crash, ``reliable_max_crashes`` (3) unless it is
            set: be started, and take its pool child or its worker with it. Then it ends as
            ``FAILURE`` with `PoisonPill`. With ``None`` nothing stops it.
        max_requeues: How many times it may go back to its queue, by ``Reject(requeue=True)`` or
            with ``acks_on_timeout=False``; ``reliable_max_requeues`` (100) unless it is set.
        dead_letter: Whether it is kept as a dead letter when it has failed for good, or for which
            causes: ``True``, ``False``, names of causes, or a mapping of names to ``True`` and
            ``False`` where they differ from the default; ``reliable_dead_letter`` unless it is set.
        reliable_once: What `@once` made of the task, or ``None``.
    """

    abstract = True
    Request = "reliable_tasks._celery.request:ReliableRequest"

    retrying: Retrying | None = None
    exclusive: bool = False
    max_crashes: ClassVar[int | None]
    max_requeues: ClassVar[int | None]
    dead_letter: ClassVar[DeadLetterOption]
    _policy: ClassVar[Policy | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_versions()
        options_of_body = None
        body = cls.__dict__.get("run")
        if body is not None:
            function = body.__func__ if isinstance(body, staticmethod) else body
            options_of_body = once_options(function)
            setattr(cls, "run", guarded(function, takes_self=body is function))  # noqa: B010
        for name, wrap in WRAPPED.items():
            owner = next(one for one in cls.__mro__ if name in one.__dict__)
            is_done = owner is not cls and issubclass(owner, ReliableTask)
            if owner is not Task and not is_done:
                setattr(cls, name, wrap(owner.__dict__[name]))
        once = options_of_body or once_options(cls)
        if once is not None:
            cls.adopt_once(once)

    @classmethod
    def adopt_once(cls, options: OnceOptions) -> None:
        """Make this a once-task, and the classes below it. ``@once`` calls it.

        Raises:
            ConfigError: The key template does not fit the task.
        """
        setattr(cls, OPTIONS, options)
        body = getattr(cls.run, "__wrapped__", cls.run)
        takes_self = getattr(cls.run, "__takes_self__", True)
        name = cls.__dict__.get("name") or cls.__qualname__
        cls.reliable_once = Once(options, body, takes_self=takes_self, task=name)

    @classmethod
    def _adopt_retrying(cls) -> None:
        name = cls.name or cls.__qualname__
        if cls.retrying is not None and getattr(cls, "autoretry_for", None):
            raise ConfigError(
                f"{name} has retrying= and autoretry_for=, which would both retry it: keep one "
                "(retrying=retry_if_exception_type(...) says which errors)"
            )
        cls._policy = None if cls.retrying is None else Policy(cls.retrying, name)

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Take the settings of an app. Celery calls it."""
        for attribute, setting, default in _DEFAULTS:
            if getattr(cls, attribute, None) is None and not explicit(app, setting)[0]:
                setattr(cls, attribute, default)
        cls._visibility_margin = read_config(app).visibility_margin
        bound = super().bind(app)
        # Not before: task_annotations can have set them a moment ago.
        cls._adopt_retrying()
        cls._end_options = read_options(app, cls)
        return bound

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> ReliableResult:
        """Queue the task; takes what Celery's `apply_async` takes.

        Returns:
            The result, with ``.duplicate`` true where a `@once` key was taken already. Then
            nothing was queued; or, for a part of a canvas and a call with callbacks, a task that
            waits for the owner of the key and ends as it does.

        Raises:
            DuplicateTaskError: The `@once` key is taken, and ``on_conflict`` is ``"raise"``, or
                a callback or the next task of a chain needs a value that no backend keeps.
            kombu.exceptions.OperationalError: The broker cannot be reached. The key is free, or
                left to the next call.
            StoreUnavailable: The lock Redis cannot be reached.
        """
        once = self._take_once(options)
        call = self._call(args, kwargs, task_id, producer, link, link_error, shadow, options)
        if once is None or self.app.conf.task_always_eager:
            return call.queue(task_id, None)
        return publish(self, once, call)

    def apply_many(
        self, calls: Iterable[tuple[Any, Mapping[str, Any] | None]], **options: Any
    ) -> list[ReliableResult]:
        """Queue the task many times, in a handful of round trips on a Redis broker.

        Args:
            calls: For each call its positional arguments and its keyword arguments; either may be
                empty or ``None``.
            **options: Of all calls alike: what `apply_async` takes, without ``task_id``.

        Returns:
            The results in the order of the calls. For a `@once` key that is taken, by another
            call or by an earlier one of these, ``.duplicate`` is true, and nothing was queued;
            ``on_conflict="raise"`` does not raise here. With callbacks a duplicate waits for
            the owner of the key, as in `apply_async`, and ``.followed_id`` says for whom; where
            `apply_async` would raise nothing was queued, and that is ``None``.

        Raises:
            TypeError: A call is no pair of arguments; nothing was queued.
            kombu.exceptions.OperationalError: The broker cannot be reached. Some calls may be
                queued by then, and are duplicates when all are called again.
            StoreUnavailable: The lock Redis cannot be reached; the same.
        """
        pairs = [_pair(number, call) for number, call in enumerate(calls)]
        if "task_id" in options:
            raise TypeError(
                f"{self.name}.apply_many(task_id={options['task_id']!r}): each call has an id of "
                "its own; leave it out"
            )
        if self.app.conf.task_always_eager:
            return [self.apply_async(args, kwargs, **options) for args, kwargs in pairs]
        once = self._take_once(options)
        producer = options.pop("producer", None)
        link, link_error = options.pop("link", None), options.pop("link_error", None)
        shadow, adds = options.pop("shadow", None), options.pop("add_to_parent", True)
        # The parent is told of what is queued, when that is known.
        options["add_to_parent"] = False
        made = [
            self._call(args, kwargs, None, producer, link, link_error, shadow, options)
            for args, kwargs in pairs
        ]
        results = queue_many(self, made) if once is None else publish_many(self, once, made)
        parent: Any = self.app.current_worker_task
        if parent is not None and adds:
            for result in results:
                if not result.duplicate or result.followed_id is not None:
                    parent.add_trail(result)
        return results

    def _call(
        self,
        args: Any,
        kwargs: Any,
        task_id: str | None,
        producer: Any,
        link: Any,
        link_error: Any,
        shadow: str | None,
        options: dict[str, Any],
    ) -> Call:
        # A canvas freezes the ids of its parts, and with them who is to be answered.
        is_part = task_id is not None and "reply_to" in options
        waited_for = is_part or link or link_error or any(options.get(n) for n in _CANVAS)
        return Call(
            args=args,
            kwargs=kwargs,
            task_id=task_id,
            producer=producer,
            link=link,
            link_error=link_error,
            shadow=shadow,
            options=options,
            is_waited_for=bool(waited_for),
            queued_by=self._queue,
        )

    def _queue(
        self, call: Call, identity: str | None, headers: Mapping[str, Any] | None, producer: Any
    ) -> ReliableResult:
        given = call.options if headers is None else {**call.options, "headers": dict(headers)}
        lineage = lineage_headers(self.app, identity)
        if lineage:
            given = {**given, "headers": {**(given.get("headers") or {}), **lineage}}
        result = super().apply_async(
            call.args,
            call.kwargs,
            identity,
            producer,
            call.link,
            call.link_error,
            call.shadow,
            **with_short_delay(self.app, given),
        )
        return _as_reliable(result)

    def _take_once(self, options: dict[str, Any]) -> Once | None:
        """Return the `@once` that applies to a call; what only that knows leaves its options."""
        return self.reliable_once

    @property
    def claim(self) -> HeldClaim | None:
        """What the running task holds of its `@once` key.

        ``None`` outside of a run, without `@once`, where the key was freed at the start
        (``lock="until_executing"``), and where the task runs without the lock Redis
        (``reliable_on_store_error="proceed"``).
        """
        return held_claim(self)

    def delay(self, *args: Any, **kwargs: Any) -> ReliableResult:
        """Queue the task with these arguments."""
        return self.apply_async(args, kwargs)

    def AsyncResult(self, task_id: str, **options: Any) -> ReliableResult:  # noqa: N802 - Celery's
        """Return the result of the task with this id."""
        options.setdefault("backend", self.backend)
        options.setdefault("app", self.app)
        return ReliableResult(task_id, task_name=self.name, **options)

    def retry(self, *args: Any, **options: Any) -> Retry:
        """Retry the task, as Celery's `retry` does, without losing it when the broker is away.

        Raises:
            LockLost: The task lost its claim to another one.
        """
        run = Run.of(self)
        error = options.get("exc")
        is_answer = self.reliable_once is not None and (
            is_follower(self) or (isinstance(error, DuplicateTaskError) and not run)
        )
        # With autoretry_for=(Exception,) Celery takes for an error of the task what is an answer to
        # a copy that does not run: its "retry" would count as a later attempt.
        if (verdict := condemned(self.request)) is not None:
            raise verdict
        if isinstance(error, Exception) and is_answer:
            raise error
        claim = run.claim if run else Claim.from_headers(self.request.headers, self.request.id)
        given = options.get("headers", self.request.headers) or {}
        headers = without_brokers_own(given, *OF_ONE_DELIVERY, *OF_ONE_COPY) | carried_count(self)
        if claim is not None:
            # A message published by name has no claim in its headers, and a caller's own headers
            # replace those that it has.
            headers[CLAIM] = claim.as_owner.as_header()
        if error is not None:
            headers.setdefault(FIRST_FAILED, time.time())
        if headers != given:
            options["headers"] = headers
        try:
            with continuing(self, self.request.id, self._note_done):
                return super().retry(*args, **options)
        except Reject as rejected:
            # Celery drops a task whose retry it could not publish.
            cause = rejected.args[0]
            if isinstance(cause, LockLost):
                raise cause from (error if isinstance(error, BaseException) else None)
            if isinstance(cause, Superseded):
                logger.error(
                    "Task %s[%s] lost its lease and was taken over: its retry is not queued",
                    self.name,
                    self.request.id,
                )
                raise Ignore from None
            if isinstance(cause, (OperationalError, StoreError)):
                reason = f"its retry could not be published: {cause}"
                raise SetAside(reason, *_AFTER_FAILED_RETRY) from None
            raise

    def on_replace(self, sig: Any) -> Any:
        """Send the replacement; one with the same `@once` key goes on with the claim."""
        run = Run.of(self)
        note_end(self)
        if run is not None:
            headers = {**(sig.options.get("headers") or {}), CLAIM: run.claim.as_header()}
            sig.set(headers=headers)
        give_count(self, sig)
        try:
            if isinstance(sig, (group, chord)):
                check_held(self.app, self)
                try:
                    return super().on_replace(sig)
                except Ignore:
                    note_continued(self.app, self, self._note_done)
                    raise
            with continuing(self, None, self._note_done):
                return super().on_replace(sig)
        except Superseded:
            logger.error(
                "Task %s[%s] lost its lease and was taken over: its replacement is not queued",
                self.name,
                self.request.id,
            )
            raise Ignore from None

    def start_strategy(self, app: Celery, consumer: Any, **options: Any) -> Any:
        """Get ready to receive messages. A worker calls it when it has connected."""
        remember_consumer(app, consumer)
        return super().start_strategy(app, consumer, **options)

    def _note_done(self) -> None:
        locks = locks_of(self.app)
        note_done(self, locks.claims, locks.config)


def _as_reliable(result: Any) -> ReliableResult:
    if isinstance(result, EagerResult):
        # An eager call has run when it returns: there is nothing it could be a duplicate of.
        result.duplicate = False  # type: ignore[attr-defined]
        result.replaced_id = None  # type: ignore[attr-defined]
        result.followed_id = None  # type: ignore[attr-defined]
        result.ignored_id = None  # type: ignore[attr-defined]
    return cast(ReliableResult, result)


def _pair(number: int, call: Any) -> tuple[Any, Any]:
    """Return the arguments of one call of many.

    Raises:
        TypeError: It is no pair of arguments.
    """
    if isinstance(call, (tuple, list)) and len(call) == 2:
        args, kwargs = call
        if isinstance(args, (tuple, list, type(None))) and isinstance(
            kwargs, (Mapping, type(None))
        ):
            return args, kwargs
    raise TypeError(
        f"call {number} of apply_many is {call!r}: give (args, kwargs), as in ((7,), {{}})"
    )
