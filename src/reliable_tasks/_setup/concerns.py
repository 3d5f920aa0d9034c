"""Which of the user's own settings break the promise.

A check looks at one thing that the user set. The reasons are what the report prints; what they
rest on was measured, see ``docs/delivery.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reliable_tasks._celery.settings import explicit
from reliable_tasks._setup.facts import Facts
from reliable_tasks._setup.report import Concern
from reliable_tasks._setup.visibility import VisibilityTimeout, count

__all__ = ["CHECKS", "concerns"]


def concerns(facts: Facts, timeout: VisibilityTimeout, knows_all_tasks: bool) -> Iterator[Concern]:
    """Look at what the user set, and say what breaks the promise."""
    for setting, is_bad, reason in CHECKS:
        is_set, value = explicit(facts.app, setting)
        if is_set and is_bad(value, facts):
            yield Concern(setting, value, reason)
    yield from _misplaced(facts)
    if facts.broker == "redis":
        yield from _redis_concerns(facts, timeout)
    if facts.is_stock and knows_all_tasks and timeout.unlimited:
        names = ", ".join(timeout.unlimited[:5]) + (", ..." if timeout.unlimited[5:] else "")
        yield Concern(
            "task_time_limit",
            None,
            f"{count(timeout.unlimited)} no hard time limit ({names}): no "
            "visibility_timeout is safe without; give them a preset or time_limit=, or say "
            "apply_reliable_config(longest_task=...)",
        )


def _misplaced(facts: Facts) -> Iterator[Concern]:
    for place in ("visibility_timeout", "result_backend_transport_options"):
        is_set, value = explicit(facts.app, place)
        if isinstance(value, Mapping):
            is_set, value = "visibility_timeout" in value, value.get("visibility_timeout")
        if is_set and "visibility_timeout" not in facts.transport_options:
            yield Concern(
                place,
                value,
                "has no effect here: kombu reads visibility_timeout from "
                "broker_transport_options only",
            )


def _redis_concerns(facts: Facts, timeout: VisibilityTimeout) -> Iterator[Concern]:
    options = facts.transport_options
    own = options.get("visibility_timeout")
    if own is not None and own < timeout.seconds and not facts.has_own_transport:
        yield Concern(
            "broker_transport_options.visibility_timeout",
            own,
            f"shorter than {timeout.seconds} s ({'; '.join(timeout.reasons)}): a task can be "
            "handed to a second worker while the first runs it",
        )
    if options.get("ack_emulation") is False:
        yield Concern(
            "broker_transport_options.ack_emulation",
            False,
            "the broker forgets a message when it is fetched: a worker's death loses it",
        )


def _is_false(value: Any, facts: Facts) -> bool:
    return value is False


def _is_false_on_stock(value: Any, facts: Facts) -> bool:
    return value is False and not facts.carries


def _is_true_on_lease(value: Any, facts: Facts) -> bool:
    return value is True and facts.carries


def _is_true_without_backend(value: Any, facts: Facts) -> bool:
    return value is True and not facts.has_backend


CHECKS: tuple[tuple[str, Callable[[Any, Facts], bool], str], ...] = (
    ("task_acks_late", _is_false, "a task whose worker dies is lost; set it to True"),
    (
        "task_reject_on_worker_lost",
        _is_false,
        "a task whose pool child is killed is acknowledged and fails; set it to True",
    ),
    (
        "task_acks_on_failure_or_timeout",
        _is_false,
        (
            "a task over its hard limit runs again without end, one that fails is dropped from the "
            "broker; set it to True"
        ),
    ),
    (
        "task_acks_on_timeout",
        _is_false,
        "a task over its hard limit runs again without end; set it to True",
    ),
    (
        "worker_deduplicate_successful_tasks",
        _is_true_without_backend,
        (
            "without a result backend it loses every redelivered task; set a result_backend, or "
            "set it to False"
        ),
    ),
    (
        "worker_cancel_long_running_tasks_on_connection_loss",
        _is_false_on_stock,
        (
            "after a lost connection a task runs on here while another worker starts it; set it to "
            "True"
        ),
    ),
    (
        "worker_cancel_long_running_tasks_on_connection_loss",
        _is_true_on_lease,
        (
            "after a lost connection running tasks are killed and started again, although nobody "
            "else has them; set it to False"
        ),
    ),
    (
        "worker_consumer",
        lambda value, facts: facts.broker != "other" and "CarryingConsumer" not in str(value),
        (
            "a consumer of your own forgets what is held when the connection is lost, and drops "
            "what it cannot read; derive it from reliable_tasks._celery.consumer.CarryingConsumer"
        ),
    ),
    (
        "worker_prefetch_multiplier",
        lambda value, facts: value == 0,
        (
            "a worker takes messages without bound, and those wait behind each other for longer "
            "than any visibility_timeout; set it to 1"
        ),
    ),
    (
        "task_publish_retry_policy",
        lambda value, facts: isinstance(value, Mapping) and value.get("max_retries", 0) is None,
        "a call hangs while the broker is away; give it a max_retries",
    ),
    (
        "task_default_delivery_mode",
        lambda value, facts: facts.broker == "amqp" and value in (1, "transient"),
        "RabbitMQ keeps tasks in memory only and loses them when it restarts; set 'persistent'",
    ),
    (
        "task_default_queue_type",
        lambda value, facts: facts.broker == "amqp" and value == "classic",
        (
            "a classic queue does not survive the loss of its node and counts no deliveries; set "
            "'quorum', under a new queue name, for a queue cannot change its type"
        ),
    ),
    (
        "task_time_limit",
        lambda value, facts: value == 0,
        "0 is no limit for Celery: a hung task is never stopped",
    ),
)
