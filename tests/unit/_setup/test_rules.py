"""Which settings of the user's own are warned about, and what is said twice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from celery import Celery

from reliable_tasks import ReliableWarning, apply_reliable_config

REDIS, RABBIT = "redis://h", "amqp://h//"
STOCK = {"reliable_broker": "stock"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery reads URLs from the environment too."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def concerns(broker: str, backend: str | None, *limits: int | None, **settings: Any) -> list[str]:
    """What is said about an app with these settings and a task for each limit."""
    app = Celery(broker=broker, backend=backend, set_as_current=False)
    app.conf.update(settings)

    def nothing() -> None:
        pass

    for number, limit in enumerate(limits):
        app.task(nothing, name=f"t{number}", shared=False, time_limit=limit, acks_late=True)
    app.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReliableWarning)
        return [str(concern) for concern in apply_reliable_config(app).concerns]


BAD: list[tuple[str, str | None, dict[str, Any], str]] = [
    (REDIS, None, {"task_reject_on_worker_lost": False}, "is acknowledged and fails"),
    (REDIS, None, {"task_acks_on_failure_or_timeout": False}, "runs again without end"),
    (REDIS, None, {"task_acks_on_timeout": False}, "runs again without end"),
    (REDIS, None, {"worker_deduplicate_successful_tasks": True}, "loses every redelivered task"),
    (
        REDIS,
        None,
        {"worker_cancel_long_running_tasks_on_connection_loss": False, **STOCK},
        "runs on here while another worker starts it",
    ),
    (
        RABBIT,
        None,
        {"worker_cancel_long_running_tasks_on_connection_loss": False},
        "runs on here while another worker starts it",
    ),
    (
        REDIS,
        None,
        {"worker_cancel_long_running_tasks_on_connection_loss": True},
        "are killed and started again, although nobody",
    ),
    (
        RABBIT,
        REDIS,
        {"worker_cancel_long_running_tasks_on_connection_loss": True},
        "are killed and started again, although nobody",
    ),
    (REDIS, None, {"worker_consumer": "mine:Consumer"}, "derive it from"),
    (REDIS, None, {"worker_prefetch_multiplier": 0}, "takes messages without bound"),
    (REDIS, None, {"task_publish_retry_policy": {"max_retries": None}}, "a call hangs"),
    (RABBIT, None, {"task_default_delivery_mode": 1}, "keeps tasks in memory only"),
    (RABBIT, None, {"task_default_delivery_mode": "transient"}, "keeps tasks in memory only"),
    (RABBIT, None, {"task_default_queue_type": "classic"}, "'quorum', under a new queue name"),
    (REDIS, None, {"task_time_limit": 0}, "0 is no limit for Celery"),
    (REDIS, None, {"visibility_timeout": 9999}, "kombu reads visibility_timeout from"),
    (
        REDIS,
        REDIS,
        {"result_backend_transport_options": {"visibility_timeout": 9999}},
        "kombu reads visibility_timeout from",
    ),
    (
        REDIS,
        None,
        {"broker_transport_options": {"visibility_timeout": 30}, **STOCK},
        "shorter than 70 s (60 s hard limit of t0; 10 s margin)",
    ),
    (REDIS, None, {"broker_transport_options": {"ack_emulation": False}}, "forgets a message"),
]


@pytest.mark.parametrize(("broker", "backend", "settings", "words"), BAD)
def test_what_breaks_the_promise_is_named(
    broker: str, backend: str | None, settings: dict[str, Any], words: str
) -> None:
    """Each with its value, what it breaks, and what would mend it."""
    (found,) = concerns(broker, backend, 60, **settings)
    assert words in found
    assert found.startswith(next(iter(settings)))


@pytest.mark.parametrize(
    ("broker", "backend", "settings"),
    [
        (REDIS, REDIS, {"worker_deduplicate_successful_tasks": True}),
        (REDIS, None, {"worker_cancel_long_running_tasks_on_connection_loss": False}),
        (REDIS, None, {"worker_cancel_long_running_tasks_on_connection_loss": True, **STOCK}),
        (REDIS, None, {"worker_consumer": "mine:MyCarryingConsumer"}),
        (REDIS, None, {"broker_transport_options": {"visibility_timeout": 30}}),
        (REDIS, None, {"task_default_delivery_mode": 1}),
        (REDIS, None, {"task_default_queue_type": "classic"}),
        (REDIS, None, {"task_acks_on_failure_or_timeout": True}),
        (REDIS, None, {"task_publish_retry_policy": {"max_retries": 5}}),
        (REDIS, None, {"broker_transport_options": {"visibility_timeout": 70}}),
        (
            REDIS,
            REDIS,
            {
                "broker_transport_options": {"visibility_timeout": 99},
                "result_backend_transport_options": {"visibility_timeout": 99},
            },
        ),
        (RABBIT, None, {"broker_transport_options": {"confirm_publish": True}}),
    ],
)
def test_what_keeps_the_promise_is_not(
    broker: str, backend: str | None, settings: dict[str, Any]
) -> None:
    """Nobody is warned about a sound setting."""
    assert concerns(broker, backend, 60, **settings) == []


def test_tasks_without_a_limit_are_named() -> None:
    """On stock Redis, where the timeout follows from it; a few of them, not a hundred."""
    (found,) = concerns(REDIS, None, 60, *[None] * 7, **STOCK)
    assert "7 tasks have no hard time limit (t1, t2, t3, t4, t5, ...)" in found
    assert concerns(REDIS, None, None, reliable_longest_task=60, **STOCK) == []
    assert concerns(REDIS, None, None) == [], "a lease is renewed for as long as a task runs"
    assert concerns(RABBIT, None, None) == []


def test_a_plain_task_that_acks_early_is_named() -> None:
    """Whether it said so itself or was made before the settings."""
    app = Celery(broker=REDIS, set_as_current=False)

    @app.task(name="early", acks_late=False, shared=False, time_limit=60)
    def early() -> None:
        pass

    app.finalize()
    with pytest.warns(ReliableWarning, match=r"acks_late = False: the value of early"):
        apply_reliable_config(app)


SENTINEL = {
    "master_name": "m",
    "sentinel_kwargs": {"password": "p"},
    "min_other_sentinels": 1,
    "global_keyprefix": "b:",
}


@pytest.mark.parametrize(
    ("broker", "backend", "mirrored"),
    [
        ("sentinel://s", "sentinel://s", set(SENTINEL)),
        ("redis://h", "redis://h", {"global_keyprefix"}),
        ("sentinel://s", "redis://h", {"global_keyprefix"}),
        ("sentinel://s", "db+sqlite:///x", set()),
        ("amqp://h", "redis://h", set()),
    ],
)
def test_what_the_backend_needs_is_said_there_too(
    broker: str, backend: str, mirrored: set[str]
) -> None:
    """Celery reads the options of the broker and of the backend from two places."""
    app = Celery(broker=broker, backend=backend, set_as_current=False)
    app.conf.broker_transport_options = dict(SENTINEL)
    apply_reliable_config(app)
    found = app.conf.result_backend_transport_options
    assert found == {name: SENTINEL[name] for name in mirrored}


def test_the_users_own_backend_options_stay() -> None:
    """Only what is missing is mirrored."""
    app = Celery(broker="redis://h", backend="redis://h", set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "b:"}
    app.conf.result_backend_transport_options = {"global_keyprefix": "r:", "x": 1}
    apply_reliable_config(app)
    assert app.conf.result_backend_transport_options == {"global_keyprefix": "r:", "x": 1}
