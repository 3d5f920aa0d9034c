"""``apply_reliable_config``: whenever, however often, and never against the user."""

from __future__ import annotations

import gc
import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu.transport import redis as redis_transport

from reliable_tasks import (
    ConfigError,
    ReliableTask,
    ReliableWarning,
    UnsupportedCelery,
    apply_reliable_config,
    once,
)
from reliable_tasks._broker.channel import ReliableChannel
from reliable_tasks._celery import versions
from reliable_tasks._setup import apply
from reliable_tasks._setup.apply import StartCheck

REDIS = "redis://broker/0"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery reads URLs from the environment too."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def new_app(broker: str | None = REDIS, backend: str | None = "redis://results/1") -> Celery:
    """An app that was told where its servers are."""
    return Celery("shop", broker=broker, backend=backend, set_as_current=False)


def add_task(app: Celery, name: str = "t", **options: Any) -> None:
    """Add a task with a limit."""

    def nothing() -> None:
        pass

    app.task(nothing, name=name, shared=False, **{"time_limit": 60, **options})


# -- what is set -----------------------------------------------------------------------------


def test_it_sets_what_redis_needs() -> None:
    """Late acks, a small prefetch, and what kombu reads from the transport options alone."""
    app = new_app()
    add_task(app)
    report = apply_reliable_config(app)
    app.finalize()
    assert str(report)
    conf = app.conf
    assert conf.task_acks_late is conf.task_reject_on_worker_lost is conf.task_track_started is True
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_deduplicate_successful_tasks is True
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert conf.worker_consumer == "reliable_tasks._celery.consumer:CarryingConsumer"
    assert conf.broker_connection_retry_on_startup is True
    assert conf.result_backend_always_retry is True
    options = conf.broker_transport_options
    assert options["visibility_timeout"] == 70
    assert options["unacked_restore_interval"] == options["unacked_restore_throttle"] == 1
    assert options["max_retries"] == 3
    assert options["socket_keepalive"] is True
    assert "task_default_queue_type" not in {change.setting for change in report.changes}
    assert options["reliable"] == {
        "key_prefix": "reliable:",
        "lease": 15.0,
        "death_detection": "connection",
        "wait_replicas": 0,
        "store_timeout": 5.0,
        "undecodable": {"max_age": 90 * 86400.0, "max_count": 100_000, "max_body": 1_000_000},
    }


def test_the_transport_is_told_the_users_settings() -> None:
    """kombu hands it nothing but the transport options."""
    app = new_app()
    app.conf.update(
        reliable_key_prefix="r:",
        reliable_lease=30,
        reliable_death_detection="lease",
        reliable_wait_replicas=1,
        reliable_store_timeout=2,
        reliable_dead_letter={"undecodable": False},
    )
    apply_reliable_config(app)
    assert app.conf.broker_transport_options["reliable"] == {
        "key_prefix": "r:",
        "lease": 30,
        "death_detection": "lease",
        "wait_replicas": 1,
        "store_timeout": 2,
        "undecodable": None,
    }


def test_the_users_own_transport_option_stays() -> None:
    """Whoever tells the transport himself is asked nothing."""
    app = new_app()
    app.conf.broker_transport_options = {"reliable": {"lease": 3}}
    apply_reliable_config(app)
    assert app.conf.broker_transport_options["reliable"] == {"lease": 3}


def test_stock_kombu_gets_what_it_needs() -> None:
    """Running tasks are not carried over a lost connection, and no script fetches."""
    app = new_app()
    app.conf.reliable_broker = "stock"
    apply_reliable_config(app)
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss is True
    assert app.conf.worker_consumer == "reliable_tasks._celery.consumer:CarryingConsumer"
    assert "reliable" not in app.conf.broker_transport_options
    assert app.conf.broker_transport_options["visibility_timeout"] == 3610


@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel", "redis+socket"])
@pytest.mark.parametrize("setting", ["reliable", "stock"])
def test_the_connection_has_the_transport_that_was_asked_for(scheme: str, setting: str) -> None:
    """Two apps in one process may differ."""
    app = new_app(f"{scheme}://h/0")
    app.conf.reliable_broker = setting
    app.conf.broker_transport_options = {"master_name": "m"}
    apply_reliable_config(app)
    apply_reliable_config(new_app())
    channel: Any = app.connection_for_write().transport.Channel
    assert issubclass(channel, ReliableChannel) is (setting == "reliable")
    stock = redis_transport.SentinelChannel if scheme == "sentinel" else redis_transport.Channel
    assert issubclass(channel, stock)


def test_it_sets_what_rabbitmq_needs() -> None:
    """Quorum queues and confirms, and nothing that only Redis knows."""
    app = new_app("amqp://h//", None)
    apply_reliable_config(app)
    conf = app.conf
    assert conf.task_default_queue_type == conf.task_create_missing_queue_type == "quorum"
    assert conf.task_default_exchange_type == "topic"
    assert conf.broker_transport_options["confirm_publish"] is True
    assert not {"visibility_timeout", "reliable"} & set(conf.broker_transport_options)
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is True
    assert conf.worker_deduplicate_successful_tasks is False, "it needs a result backend"
    assert conf.redis_socket_timeout == 120.0


def test_rabbitmq_with_a_redis_beside_carries_what_runs() -> None:
    """Its guard keeps the copy that the broker makes from starting."""
    app = new_app("amqp://h//")
    apply_reliable_config(app)
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert app.conf.worker_consumer == "reliable_tasks._celery.consumer:CarryingConsumer"
    assert "reliable" not in app.conf.broker_transport_options


def test_another_broker_is_left_alone() -> None:
    """What holds for every broker is still set."""
    app = new_app("sqs://", None)
    apply_reliable_config(app)
    assert app.conf.task_acks_late is True
    assert app.conf.broker_transport_options == {}


def test_the_report_has_old_and_new_values() -> None:
    """And the reason, for each setting."""
    report = apply_reliable_config(new_app())
    change = report["task_acks_late"]
    assert (change.old, change.new) == (False, True)
    assert "not lost" in change.reason
    nested = report["broker_transport_options.visibility_timeout"]
    assert (nested.old, nested.new) == (None, 3610)
    assert all(change.reason for change in report.changes)


# -- when ------------------------------------------------------------------------------------


def before(app: Celery, settings: dict[str, Any]) -> None:
    """The usual order: the library first, settings later."""
    apply_reliable_config(app)
    app.conf.update(settings)


def after(app: Celery, settings: dict[str, Any]) -> None:
    """Settings first."""
    app.conf.update(settings)
    apply_reliable_config(app)


def after_configured(app: Celery, settings: dict[str, Any]) -> None:
    """The configuration was read already."""
    app.conf.update(settings)
    assert app.conf.broker_url
    apply_reliable_config(app)


def late(app: Celery, settings: dict[str, Any]) -> None:
    """Set after all else."""
    apply_reliable_config(app)
    assert app.conf.broker_url
    app.conf.update(settings)


def by_object(app: Celery, settings: dict[str, Any]) -> None:
    """From an object, after the library."""
    apply_reliable_config(app)
    app.config_from_object(SimpleNamespace(**settings))


def django(app: Celery, settings: dict[str, Any]) -> None:
    """From Django's settings, which hold much else."""
    upper = {f"CELERY_{name.upper()}": value for name, value in settings.items()}
    app.config_from_object(
        SimpleNamespace(INSTALLED_APPS=[], TIME_ZONE="UTC", **upper), namespace="CELERY"
    )
    apply_reliable_config(app)


def django_before(app: Celery, settings: dict[str, Any]) -> None:
    """The same, in the other order."""
    upper = {f"CELERY_{name.upper()}": value for name, value in settings.items()}
    apply_reliable_config(app)
    app.config_from_object(SimpleNamespace(DEBUG=True, **upper), namespace="CELERY")


def twice(app: Celery, settings: dict[str, Any]) -> None:
    """Called again after the settings."""
    apply_reliable_config(app)
    app.conf.update(settings)
    apply_reliable_config(app)


def reconfigured(app: Celery, settings: dict[str, Any]) -> None:
    """Configured a second time."""
    apply_reliable_config(app)
    assert app.conf.task_acks_late
    app.config_from_object(SimpleNamespace(**settings))


ORDERS = [
    before,
    after,
    after_configured,
    late,
    by_object,
    django,
    django_before,
    twice,
    reconfigured,
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_users_values_stay_whatever_the_order(order: Any) -> None:
    """And what was left open is set."""
    app = new_app()
    order(app, {"worker_prefetch_multiplier": 7, "task_acks_late": True})
    assert app.conf.worker_prefetch_multiplier == 7
    assert app.conf.task_acks_late is True
    assert app.conf.task_track_started is True
    assert app.conf.broker_transport_options["unacked_restore_interval"] == 1
    report = apply_reliable_config(app)
    changed = {change.setting for change in report.changes}
    assert "worker_prefetch_multiplier" not in changed
    assert "task_track_started" in changed


@pytest.mark.parametrize("order", ORDERS)
def test_a_value_that_breaks_the_promise_is_named_whatever_the_order(order: Any) -> None:
    """It stays, is in the report, and is warned about."""
    app = new_app()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReliableWarning)
        order(app, {"task_acks_late": False})
        report = apply_reliable_config(app)
    with pytest.warns(ReliableWarning, match="task_acks_late = False: a task whose worker dies"):
        concerns = report.concerns
    assert [concern.setting for concern in concerns] == ["task_acks_late"]
    assert app.conf.task_acks_late is False


@pytest.mark.parametrize("order", [o for o in ORDERS if o is not late])
def test_mappings_are_merged(order: Any) -> None:
    """kombu replaces them whole, so the user's part and ours are put together."""
    app = new_app()
    order(
        app,
        {
            "broker_transport_options": {
                "global_keyprefix": "b:",
                "socket_timeout": 1,
                "visibility_timeout": 9999,
            }
        },
    )
    options = app.conf.broker_transport_options
    assert options["global_keyprefix"] == "b:"
    assert (options["socket_timeout"], options["visibility_timeout"]) == (1, 9999)
    assert options["unacked_restore_interval"] == 1
    assert app.conf.result_backend_transport_options == {"global_keyprefix": "b:"}


def test_nothing_is_read_before_its_time() -> None:
    """The app can still be configured afterwards, and its report is made when looked at."""
    app = new_app()
    report = apply_reliable_config(app)
    assert not app.configured  # type: ignore[attr-defined]
    app.conf.worker_prefetch_multiplier = 3
    assert "worker_prefetch_multiplier" not in {change.setting for change in report.changes}


def test_called_again_it_changes_nothing_more() -> None:
    """The second report says what the first did."""
    app = new_app()
    first = apply_reliable_config(app).as_dict()
    settings = dict(app.conf.broker_transport_options)
    second = apply_reliable_config(app).as_dict()
    assert first == second
    assert app.conf.broker_transport_options == settings


def test_tasks_that_come_later_count() -> None:
    """The timeout is computed again when somebody looks."""
    app = new_app()
    report = apply_reliable_config(app)
    add_task(app)
    app.finalize()
    assert report["broker_transport_options.visibility_timeout"].new == 70
    add_task(app, "longer", time_limit=500)
    assert report["broker_transport_options.visibility_timeout"].new == 510
    assert app.conf.broker_transport_options["visibility_timeout"] == 510


def test_the_longest_task_and_countdown_can_be_stated() -> None:
    """As arguments and as settings."""
    app = new_app()
    apply_reliable_config(app, longest_task=100, longest_countdown=50)
    assert app.conf.broker_transport_options["visibility_timeout"] == 160
    app = new_app()
    app.conf.update(reliable_longest_task=100, reliable_longest_countdown=50)
    apply_reliable_config(app)
    assert app.conf.broker_transport_options["visibility_timeout"] == 160


def test_a_tasks_options_follow() -> None:
    """A plain task made afterwards takes the app's settings."""
    app = new_app()
    apply_reliable_config(app)
    add_task(app)
    assert app.tasks["t"].acks_late is True


def test_two_apps_do_not_meet() -> None:
    """Each has its own report."""
    one, two = new_app(), new_app("amqp://h//", None)
    first, second = apply_reliable_config(one), apply_reliable_config(two)
    assert first["broker_transport_options.visibility_timeout"]
    assert second["broker_transport_options.confirm_publish"]


def test_a_report_does_not_keep_its_app() -> None:
    """An app that is gone has no report any more."""
    app = new_app()
    report = apply_reliable_config(app)
    app.close()
    del app
    gc.collect()
    with pytest.raises(ReferenceError, match="gone"):
        _ = report.changes


# -- errors ----------------------------------------------------------------------------------


def test_an_unknown_setting_is_an_error_at_once_where_it_is_known() -> None:
    """An app that was configured already says so immediately."""
    app = new_app()
    app.conf.reliable_once_tll = 5
    assert app.conf.broker_url
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        apply_reliable_config(app)


def test_an_unknown_setting_is_an_error_when_it_becomes_known() -> None:
    """Otherwise with the report, the first reliable task, or the worker's start."""
    app = new_app()
    report = apply_reliable_config(app)
    app.config_from_object(SimpleNamespace(CELERY_RELIABLE_ONCE_TLL=5), namespace="CELERY")
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        _ = report.changes
    add_task(app, base=ReliableTask)
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        _ = app.tasks
    with pytest.raises(ConfigError, match="did you mean 'reliable_once_ttl'"):
        start(app)


def test_an_error_that_was_mended_is_gone() -> None:
    """The settings count as they are now."""
    app = new_app()
    report = apply_reliable_config(app)
    app.conf.reliable_once_ttl = -1
    with pytest.raises(ConfigError):
        _ = report.changes
    app.conf.reliable_once_ttl = 5
    assert report.changes


def test_an_unsupported_celery_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed."""
    monkeypatch.setattr(versions, "_TOO_NEW", versions.CELERY)
    with pytest.raises(UnsupportedCelery):
        apply_reliable_config(new_app())


# -- a worker's start ------------------------------------------------------------------------


def start(app: Celery, pool: str = "celery.concurrency.prefork:TaskPool") -> None:
    """Do what a worker does before it connects."""
    StartCheck(SimpleNamespace(app=app, pool_cls=pool, concurrency=3))


def test_a_worker_checks_at_start(caplog: pytest.LogCaptureFixture) -> None:
    """The step is the app's, and a sound app starts without a word."""
    app = new_app()
    apply_reliable_config(app)
    assert StartCheck in app.steps["worker"]
    add_task(app, base=ReliableTask)
    app.finalize()
    start(app)
    assert caplog.text == ""


def test_a_worker_logs_what_breaks_the_promise(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings of Python are easily lost in a worker."""
    app = new_app()
    apply_reliable_config(app)
    app.conf.task_acks_late = False
    add_task(app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReliableWarning)
        app.finalize()
        start(app)
    assert "task_acks_late = False" in caplog.text


def test_a_worker_without_a_lock_redis_does_not_start() -> None:
    """Where a task needs one; otherwise it does."""
    app = new_app("memory://", None)
    apply_reliable_config(app)
    add_task(app, base=ReliableTask)
    app.finalize()
    start(app)

    @app.task(base=ReliableTask, shared=False)
    @once
    def t() -> None:
        pass

    with pytest.raises(ConfigError, match="set reliable_redis_url"):
        start(app)


def test_a_worker_counts_what_it_holds() -> None:
    """How many messages wait for a rate limit depends on its concurrency."""
    app = new_app()
    apply_reliable_config(app)
    add_task(app, rate_limit="1/s")
    app.finalize()
    start(app)
    assert app.conf.broker_transport_options["visibility_timeout"] == 73


def test_a_worker_on_rabbitmq_looks_at_its_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it connects for good."""
    seen = []
    monkeypatch.setattr(apply, "check_queues", seen.append)
    app = new_app("amqp://h//", None)
    apply_reliable_config(app)
    add_task(app)
    app.finalize()
    start(app)
    assert seen == [app]


class TaskPool:
    """A pool given as a class."""

    __module__ = "celery.concurrency.solo"


POOLS = [
    ("celery.concurrency.gevent:TaskPool", "gevent", False),
    ("celery.concurrency.eventlet:TaskPool", "eventlet", False),
    ("celery.concurrency.thread:TaskPool", "thread", True),
    (TaskPool, "solo", True),
]


@pytest.mark.parametrize("broker", ["reliable", "stock"])
@pytest.mark.parametrize(("pool", "name", "sweeps"), POOLS)
def test_a_worker_says_what_its_pool_cannot(
    caplog: pytest.LogCaptureFixture, broker: str, pool: Any, name: str, sweeps: bool
) -> None:
    """No pool but prefork kills a task; stock green ones do not look for the dead."""
    app = new_app()
    app.conf.reliable_broker = broker
    apply_reliable_config(app)
    add_task(app)
    app.finalize()
    with caplog.at_level(logging.WARNING):
        start(app, pool)
    enforces = "enforces" if name == "gevent" else "does not enforce"
    assert f"The {name} pool {enforces} hard time limits" in caplog.text
    never_looks = broker == "stock" and not sweeps
    assert ("never looks for a dead worker's messages" in caplog.text) is never_looks
    assert ("can be started by a second worker" in caplog.text) is (broker == "stock")


def test_a_worker_says_what_stock_kombu_does_not_promise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever turns the transport off is told what that means."""
    app = new_app()
    app.conf.reliable_broker = "stock"
    apply_reliable_config(app)
    add_task(app)
    app.finalize()
    start(app)
    for what in (
        "Stock kombu talks to the broker (reliable_broker)",
        "lost when its worker dies while it fetches, or when Redis is full",
        "a dead worker's tasks wait for visibility_timeout",
        "a lost connection ends running tasks, which start again",
        "a publish whose reply is lost can queue a message twice",
        "there is no exclusive task",
    ):
        assert what in caplog.text
