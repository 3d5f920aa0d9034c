"""Which settings the promise needs.

A rule sets one thing that the user left open. The reasons are what the report prints; what they
rest on was measured, see ``docs/delivery.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reliable_tasks._broker.transport import OPTION
from reliable_tasks._setup.facts import Facts
from reliable_tasks._setup.visibility import VisibilityTimeout

__all__ = ["SETTINGS", "Rule", "backend_options", "transport_options"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One setting, its value and why."""

    setting: str
    value: Any
    reason: str
    applies: Callable[[Facts], bool] = lambda facts: True


def _on_amqp(facts: Facts) -> bool:
    return facts.broker == "amqp"


def _carries(facts: Facts) -> bool:
    return facts.carries


def _is_known_and_does_not_carry(facts: Facts) -> bool:
    return facts.broker != "other" and not facts.carries


def _does_not_carry(facts: Facts) -> bool:
    return not facts.carries


def _has_backend(facts: Facts) -> bool:
    return facts.has_backend


def _backend_is_redis(facts: Facts) -> bool:
    return facts.backend_is_redis


def _backend_is_remote_redis(facts: Facts) -> bool:
    return facts.backend_is_remote_redis


SETTINGS: tuple[Rule, ...] = (
    Rule(
        "task_acks_late",
        True,
        "a task is acknowledged when it has ended, so one whose worker dies is not lost",
    ),
    Rule(
        "task_reject_on_worker_lost",
        True,
        "a task whose pool child is killed goes back to the queue instead of being acknowledged",
    ),
    Rule("task_track_started", True, "a task that was started can be told from one that waits"),
    Rule(
        "worker_prefetch_multiplier",
        1,
        "a worker holds no more messages than it can run, so few wait for a dead worker",
    ),
    Rule(
        "worker_cancel_long_running_tasks_on_connection_loss",
        True,
        "a lost connection gives running tasks back at once; the copy here must not run on",
        _does_not_carry,
    ),
    Rule(
        "worker_cancel_long_running_tasks_on_connection_loss",
        False,
        "running tasks run on when the connection is lost, and nobody else starts them meanwhile",
        _carries,
    ),
    Rule(
        "worker_consumer",
        "reliable_tasks._celery.consumer:CarryingConsumer",
        "what a worker holds survives the loss of its connection",
        _carries,
    ),
    Rule(
        "worker_consumer",
        "reliable_tasks._celery.consumer:CarryingConsumer",
        "a message that no worker can read is kept; on Redis no copy of a task that runs starts",
        _is_known_and_does_not_carry,
    ),
    Rule(
        "worker_deduplicate_successful_tasks",
        True,
        "a task that had succeeded when its worker died is acknowledged, not run again; so a "
        "task_id of your own must not be used twice while its result is kept",
        _has_backend,
    ),
    Rule(
        "worker_soft_shutdown_timeout",
        8.0,
        "a cold shutdown lets running tasks end for 8 s before it gives them back; keep it below "
        "the time that your platform grants (docker 10 s, Kubernetes 30 s)",
    ),
    Rule(
        "broker_connection_retry_on_startup",
        True,
        "a worker that starts before its broker waits for it",
    ),
    Rule(
        "broker_connection_max_retries",
        None,
        "a worker does not give up on its broker after 100 tries",
    ),
    Rule(
        "broker_channel_error_retry",
        True,
        "a closed channel is opened again; without it the worker exits",
        _on_amqp,
    ),
    Rule(
        "task_default_queue_type",
        "quorum",
        "a quorum queue survives the loss of a node and counts deliveries",
        _on_amqp,
    ),
    Rule(
        "task_create_missing_queue_type",
        "quorum",
        "queues that Celery creates by itself are as durable as the default one",
        _on_amqp,
    ),
    Rule(
        "task_default_exchange_type",
        "topic",
        "with quorum queues the broker keeps a task until its ETA only behind a topic exchange",
        _on_amqp,
    ),
    Rule(
        "result_backend_always_retry",
        True,
        "a result is stored when the backend is back, not recorded as a failure",
        _has_backend,
    ),
    Rule(
        "result_backend_max_retries",
        10,
        "a result backend that stays away fails the task in the end, not never",
        _has_backend,
    ),
    Rule(
        "redis_socket_timeout",
        30.0,
        "a result backend that does not answer is noticed after 30 s, not after 120",
        _backend_is_redis,
    ),
    Rule(
        "redis_socket_connect_timeout",
        5.0,
        "a result backend that is not there is noticed after 5 s",
        _backend_is_redis,
    ),
    Rule(
        "redis_socket_keepalive",
        True,
        "a connection that a firewall dropped is noticed",
        _backend_is_remote_redis,
    ),
    Rule(
        "redis_retry_on_timeout",
        True,
        "a result whose storing timed out is stored again",
        _backend_is_redis,
    ),
    Rule(
        "redis_backend_health_check_interval",
        25,
        "an idle connection to the result backend is checked before it is used",
        _backend_is_redis,
    ),
)

_PUBLISH_BOUNDS: tuple[Rule, ...] = (
    Rule(
        "max_retries",
        3,
        "a publish to a broker that is down fails; without a bound the caller hangs",
    ),
    Rule("interval_start", 0, "the first of these retries comes at once"),
    Rule("interval_step", 0.2, "each of these retries waits 0.2 s longer"),
    Rule("interval_max", 0.5, "none of these retries waits longer than 0.5 s"),
)


def transport_options(facts: Facts, timeout: VisibilityTimeout) -> tuple[Rule, ...]:
    """Return the rules for ``broker_transport_options``, the only place where kombu reads them."""
    if facts.broker == "amqp":
        confirm = Rule(
            "confirm_publish", True, "a call returns when RabbitMQ has the task, not before"
        )
        return (confirm, *_PUBLISH_BOUNDS)
    if facts.broker != "redis":
        return ()
    own: tuple[Rule, ...] = ()
    if facts.has_own_transport:
        own = (
            Rule(
                OPTION,
                {
                    "key_prefix": facts.config.key_prefix,
                    "lease": facts.config.lease,
                    "death_detection": facts.config.death_detection,
                    "wait_replicas": facts.config.wait_replicas,
                    "store_timeout": facts.config.store_timeout,
                    "undecodable": facts.undecodable,
                },
                "messages are fetched, renewed and acknowledged by scripts that lose none",
            ),
        )
    return (
        *own,
        Rule("visibility_timeout", timeout.seconds, "; ".join(timeout.reasons)),
        Rule(
            "unacked_restore_interval",
            1,
            "a dead worker's messages are looked for each second, not each 100 s "
            "(with unacked_restore_throttle)",
        ),
        Rule("unacked_restore_throttle", 1, "see unacked_restore_interval"),
        Rule(
            "unacked_mutex_expire",
            30,
            "a worker that dies while it looks blocks the others for 30 s, not for 5 min",
        ),
        Rule("socket_timeout", 30.0, "a broker that does not answer is noticed after 30 s"),
        Rule("socket_connect_timeout", 5.0, "a broker that is not there is noticed after 5 s"),
        Rule("socket_keepalive", True, "a connection that a firewall dropped is noticed"),
        Rule("health_check_interval", 25, "an idle connection is checked before it is used"),
        *_PUBLISH_BOUNDS,
    )


def backend_options(facts: Facts) -> tuple[Rule, ...]:
    """Return the rules for ``result_backend_transport_options``: what must be said there again."""
    names = []
    if facts.backend_scheme == facts.broker_scheme == "sentinel":
        names += ["master_name", "sentinel_kwargs", "min_other_sentinels"]
    if facts.broker == "redis" and facts.backend_is_redis:
        names.append("global_keyprefix")
    return tuple(
        Rule(name, facts.transport_options[name], "the same as in broker_transport_options")
        for name in names
        if name in facts.transport_options
    )
