"""Puts the rules into an app, whenever its configuration is read."""

from __future__ import annotations

import logging
import warnings
import weakref
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery, bootsteps

from reliable_tasks._broker.transport import install
from reliable_tasks._celery.chords import tell_chord_sizes
from reliable_tasks._celery.queues import check_queues, keep_what_is_dropped
from reliable_tasks._celery.registry import (
    behind_proxy,
    hard_limit,
    is_configured,
    is_finalized,
    known_tasks,
)
from reliable_tasks._celery.settings import explicit, put
from reliable_tasks._celery.versions import check_versions
from reliable_tasks._dead.keeping import note_chord
from reliable_tasks._once.decorator import refuse_plain_base
from reliable_tasks._once.purged import remember
from reliable_tasks._places import read_config
from reliable_tasks._setup import rules
from reliable_tasks._setup.concerns import concerns
from reliable_tasks._setup.facts import Facts
from reliable_tasks._setup.report import Change, Concern, Report
from reliable_tasks._setup.visibility import recommend
from reliable_tasks._worker import KeeperStep
from reliable_tasks.errors import ConfigError, ReliableWarning

__all__ = ["apply_reliable_config"]

logger = logging.getLogger("reliable_tasks")

#: For how long RabbitMQ lets a message be unacknowledged unless it is told otherwise (s).
CONSUMER_TIMEOUT = 1800.0


def apply_reliable_config(
    app: Celery,
    *,
    longest_task: float | None = None,
    longest_countdown: float | None = None,
) -> Report:
    """Set what the promise needs and you left open; an explicit setting of yours stays.

    Call it once, where the app is made. It works before and after ``config_from_object`` and
    ``app.conf.update``, with a namespace, and when called again. ``visibility_timeout`` follows
    from the limits of the app's tasks, so a worker computes it again when it starts and all its
    tasks are imported.

    Args:
        app: The app.
        longest_task: Seconds that the longest task runs which has no hard time limit; the same
            as the setting ``reliable_longest_task``.
        longest_countdown: The longest countdown or ETA that your callers use, in seconds; the
            same as ``reliable_longest_countdown``.

    Returns:
        A report of each setting, its old and new value and the reason; and of your own settings
        that break the promise, about which it warns too (`ReliableWarning`).

    Raises:
        ConfigError: A ``reliable_*`` setting is unknown or no good. Where the app is not
            configured yet, it is raised when the report or a reliable task is first used, and
            by a worker when it starts.
        UnsupportedCelery: The installed Celery or kombu is not supported.
    """
    check_versions()
    app = behind_proxy(app)
    setup = _setups.get(app)
    if setup is None:
        setup = _setups[app] = _Setup(app)
        app.on_after_configure.connect(
            setup.on_after_configure, weak=False, dispatch_uid="reliable_tasks"
        )
        remember(app)
        tell_chord_sizes(app, note_chord)
        app.steps["worker"].add(StartCheck)
        app.steps["consumer"].add(KeeperStep)
    for name, value in (("task", longest_task), ("countdown", longest_countdown)):
        if value is not None:
            app.conf[f"reliable_longest_{name}"] = value
    if is_configured(app):
        setup.apply()
    return Report(setup.outcome)


class _Setup:
    """The rules as they were last put into one app."""

    def __init__(self, app: Celery) -> None:
        # The app's signal keeps this object, which must not keep the app.
        self._app = weakref.ref(app)
        self._changes: list[Change] = []
        self._concerns: list[Concern] = []
        self._filled: dict[str, dict[str, Any]] = {}
        self._knew_all_tasks = False
        self.concurrency: int | None = None

    def on_after_configure(self, **_: Any) -> None:
        # Celery would only log what its signal's receivers raise; whoever looks meets it again.
        with suppress(ConfigError):
            self.apply()

    @property
    def concerns(self) -> list[Concern]:
        return list(self._concerns)

    def outcome(self) -> tuple[list[Change], list[Concern]]:
        app = self._here()
        app.conf.get("broker_url")  # reads a configuration that is still pending
        # Tasks, and with them limits and retry policies, may have been made since.
        self.apply()
        return list(self._changes), self.concerns

    def apply(self) -> None:
        app = self._here()
        read_config(app)
        self._knew_all_tasks = is_finalized(app)
        changes: list[Change] = []
        facts = Facts.of(app, transport_options=self._own(app, "broker_transport_options"))
        if facts.has_own_transport:
            install()
        if facts.broker == "amqp" and facts.config.dead_letter_exchange:
            keep_what_is_dropped(app)
        for rule in rules.SETTINGS:
            is_set, value = explicit(app, rule.setting)
            if not is_set and rule.applies(facts) and value != rule.value:
                put(app, rule.setting, rule.value)
                changes.append(Change(rule.setting, value, rule.value, rule.reason))
        timeout = recommend(app, known_tasks(app), concurrency=self.concurrency)
        changes += self._fill(
            app, "broker_transport_options", rules.transport_options(facts, timeout)
        )
        changes += self._fill(app, "result_backend_transport_options", rules.backend_options(facts))
        self._changes = changes
        self._concerns = [*concerns(facts, timeout, self._knew_all_tasks)]
        self._concerns += _tasks_made_too_early(app)
        for concern in self._concerns:
            # Python shows a warning of the same text once.
            warnings.warn(str(concern), ReliableWarning, stacklevel=3)

    def _here(self) -> Celery:
        app = self._app()
        if app is None:
            raise ReferenceError("the Celery app of this report is gone")
        return app

    def _own(self, app: Celery, setting: str) -> dict[str, Any]:
        """Return the user's part of a setting that is a mapping, also what was added in place."""
        filled = self._filled.get(setting, {})
        current = dict(app.conf.get(setting) or {})
        return {k: v for k, v in current.items() if k not in filled or filled[k] != v}

    def _fill(self, app: Celery, setting: str, wanted: tuple[rules.Rule, ...]) -> list[Change]:
        """Fill what is open in a setting that is a mapping: kombu replaces it whole."""
        own = self._own(app, setting)
        left_open = [rule for rule in wanted if rule.setting not in own]
        self._filled[setting] = {rule.setting: rule.value for rule in left_open}
        if left_open:
            put(app, setting, {**self._filled[setting], **own})
        return [
            Change(f"{setting}.{rule.setting}", None, rule.value, rule.reason) for rule in left_open
        ]


_setups: WeakKeyDictionary[Celery, _Setup] = WeakKeyDictionary()


def _tasks_made_too_early(app: Celery) -> list[Concern]:
    """Find plain tasks that took Celery's defaults before this library could change them."""
    if explicit(app, "task_acks_late")[0]:
        return []
    early = [task.name for task in known_tasks(app) if task.acks_late is False]
    if not early:
        return []
    reason = (
        f"the value of {', '.join(early)}, set by itself or taken before apply_reliable_config "
        "was called: a worker's death loses it; call apply_reliable_config where the app is made"
    )
    return [Concern("acks_late", False, reason)]


_STOCK = (
    "Stock kombu talks to the broker (reliable_broker), and this is not promised: a message is "
    "lost when its worker dies while it fetches, or when Redis is full; a dead worker's tasks wait "
    "for visibility_timeout; a lost connection ends running tasks, which start again; a publish "
    "whose reply is lost can queue a message twice; there is no exclusive task"
)


class StartCheck(bootsteps.Step):
    """Checks a worker before it connects, when all tasks are imported."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        app = worker.app
        setup = _setups[app]
        setup.concurrency = worker.concurrency
        setup.apply()
        for task in known_tasks(app):
            refuse_plain_base(task)
        for task in known_tasks(app):
            once = getattr(task, "reliable_once", None)
            if once is not None:
                once.locks(task).claims.client  # noqa: B018 - a bad address is an error here
        if Facts.of(app).broker == "amqp":
            check_queues(app)
            _say_what_rabbitmq_does(app, Facts.of(app))
        for concern in setup.concerns:
            logger.warning("%s", concern)
        pool = _pool_name(worker)
        facts = Facts.of(app)
        is_stock = facts.is_stock
        if is_stock:
            logger.warning(_STOCK)
        if is_stock and pool in ("gevent", "eventlet"):
            logger.warning(
                "Stock kombu never looks for a dead worker's messages in an idle %s worker: run "
                "at least one worker with another pool on this broker",
                pool,
            )
        if pool != "prefork":
            consequence = (
                "a task that runs for longer than visibility_timeout can be started by a second "
                "worker"
                if is_stock
                else "a task that hangs there is not stopped"
            )
            enforces = (
                "enforces hard time limits where a task waits, and nowhere else"
                if pool == "gevent"
                else "does not enforce hard time limits"
            )
            logger.warning("The %s pool %s: %s", pool, enforces, consequence)
        _refuse_exclusive(app, facts, pool)


def _say_what_rabbitmq_does(app: Celery, facts: Facts) -> None:
    """Say when a task can be started while it runs."""
    if not facts.has_guard_beside:
        logger.warning(
            "A task can run twice at once: when a connection is lost, RabbitMQ hands out again "
            "what it delivered, and no Redis is known that could say which tasks run. Set "
            "reliable_redis_url, or a Redis as the result_backend"
        )
    longest = {
        task.name: hard_limit(task) or facts.config.longest_task
        for task in known_tasks(app)
        if task.acks_late
    }
    names = [name for name, limit in longest.items() if limit is None or limit > CONSUMER_TIMEOUT]
    if names:
        logger.warning(
            "RabbitMQ closes the channel of a worker that does not acknowledge a message for %g "
            "min, its default consumer_timeout, and %s. These may run for longer: %s. Raise "
            "consumer_timeout, or give them a time_limit (or say reliable_longest_task)",
            CONSUMER_TIMEOUT / 60,
            "hands the message out again: the task runs on, and its copy is set aside until it has "
            "ended"
            if facts.has_guard_beside
            else "starts the task again; the worker stops the one that runs",
            ", ".join(names[:5]) + (", ..." if names[5:] else ""),
        )


def _refuse_exclusive(app: Celery, facts: Facts, pool: str) -> None:
    """Refuse tasks that must die before their lease where nothing could end them."""
    names = [task.name for task in known_tasks(app) if getattr(task, "exclusive", False)]
    if not names:
        return
    listed = ", ".join(names)
    early = [name for name in names if not app.tasks[name].acks_late]
    if early:
        raise ConfigError(
            f"exclusive=True of {', '.join(early)} needs acks_late=True: with an early ack the "
            "lease ends when the task starts"
        )
    if pool != "prefork":
        raise ConfigError(
            f"exclusive=True of {listed} needs the prefork pool, whose children can be ended one "
            f"by one; this worker's pool is {pool}"
        )
    if not facts.has_own_transport:
        raise ConfigError(
            f"exclusive=True of {listed} needs the leases of this library's transport: a redis://, "
            "rediss:// or sentinel:// broker, without reliable_broker = 'stock'"
        )
    if app.conf.get("worker_pool_start_method", "fork") == "spawn":
        raise ConfigError(
            f"exclusive=True of {listed} needs children that share memory with the worker: set "
            "worker_pool_start_method = 'fork'"
        )


def _pool_name(worker: Any) -> str:
    pool = worker.pool_cls
    module = pool if isinstance(pool, str) else pool.__module__
    return str(module).rpartition(":")[0].rpartition(".")[2] or str(module).rpartition(".")[2]
