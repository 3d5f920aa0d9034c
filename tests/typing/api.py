"""A user's module with all of the public API: checked by type checkers, never run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

import tenacity
from celery import Celery, Task, shared_task

from reliable_tasks import (
    Change,
    Concern,
    ConfigError,
    DuplicateTaskError,
    LockError,
    LockLost,
    MissingExtra,
    ReliableConfig,
    ReliableError,
    ReliableResult,
    ReliableTask,
    ReliableWarning,
    Report,
    RetriesExhausted,
    ScriptError,
    StoreError,
    StoreUnavailable,
    UnsupportedCelery,
    VisibilityTimeout,
    apply_reliable_config,
    once,
    presets,
    recommended_visibility_timeout,
)
from reliable_tasks.testing import fake_redis

app = Celery("shop", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
everywhere = Celery("shop", task_cls=ReliableTask)

# -- settings --------------------------------------------------------------------------------

report = apply_reliable_config(app, longest_task=600, longest_countdown=3600.0)
assert_type(report, Report)
assert_type(report.changes, list[Change])
assert_type(report["task_acks_late"], Change)
assert_type(report["task_acks_late"].setting, str)
assert_type(report["task_acks_late"].reason, str)
assert_type(report.concerns, list[Concern])
assert_type(report.concerns[0].setting, str)
assert_type(report.as_dict(), dict[str, list[dict[str, Any]]])
assert_type(str(report), str)

timeout = recommended_visibility_timeout(app, longest_task=600)
assert_type(timeout, VisibilityTimeout)
assert_type(timeout.seconds, int)
assert_type(timeout.reasons, tuple[str, ...])
assert_type(timeout.unlimited, tuple[str, ...])

config = ReliableConfig(once_ttl=60.0, on_store_error="proceed")
assert_type(config, ReliableConfig)
assert_type(config.once_ttl, float)
assert_type(config.redis_url, str | None)
assert_type(ReliableConfig.from_mapping({"reliable_once_ttl": 5}), ReliableConfig)

# -- tasks -----------------------------------------------------------------------------------


@app.task(base=ReliableTask, **presets.STANDARD)
@once(key="invoice:{invoice_id}")
def send_invoice(invoice_id: int, *, copy_to: str | None = None) -> str:
    """Send it, as in the README."""
    return f"{invoice_id} {copy_to}"


first = send_invoice.delay(7)
assert_type(first, ReliableResult)
assert_type(first.id, str)
assert_type(first.duplicate, bool)
assert_type(first.replaced_id, str | None)
assert_type(first.ignored_id, str | None)
assert_type(send_invoice.delay(7, copy_to="b").duplicate, bool)
assert_type(send_invoice.apply_async((7,), countdown=5, task_id="mine"), ReliableResult)
assert_type(send_invoice.AsyncResult("mine"), ReliableResult)
assert_type(
    send_invoice.apply_many([((7,), None), ([8], {"copy_to": "b"})], countdown=5),
    list[ReliableResult],
)


@once(key="report:{day}", on_conflict="raise", ttl=timedelta(hours=2))
@app.task(base=ReliableTask, **(presets.LONG | presets.rate_limit("10/m")))
def nightly(day: str) -> None:
    """Decorate above."""


assert_type(nightly.delay("monday"), ReliableResult)


@app.task(base=ReliableTask, bind=True, **(presets.BATCH | presets.time_limit(hard=60, soft=50)))
@once
def bound(self: ReliableTask, n: int) -> int:
    """Get the task."""
    if n < 0:
        raise self.retry(countdown=1)
    return n


assert_type(bound.delay(7), ReliableResult)


@app.task(
    base=ReliableTask,
    retrying=[
        tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(60),
        tenacity.wait_fixed(1) + tenacity.wait_random(0, 1),
        tenacity.retry_if_exception_type(OSError),
    ],
)
def with_strategies(url: str) -> None:
    """Retry by strategies."""


@app.task(base=ReliableTask, retrying=tenacity.Retrying(stop=tenacity.stop_after_attempt(3)))
@once(key=lambda url, depth: (url, depth), lock="until_executed", ttl=60)
def with_retrying(url: str, depth: int) -> None:
    """Retry by a Retrying."""


@shared_task(base=ReliableTask, name="shop.shared")
@once(key="{n}")
def shared(n: int) -> int:
    """Belong to every app."""
    return n


@once(key="{n}")
class Import(ReliableTask):
    """A class, with all that one sets on it."""

    name = "shop.import"
    retrying = tenacity.stop_after_attempt(3)

    def run(self, n: int) -> int:
        """Import."""
        return n


class Export(ReliableTask):
    """A class with the decorator at its body."""

    retrying = (tenacity.stop_after_attempt(3), tenacity.wait_fixed(1))

    @once(key="{n}")
    def run(self, n: int) -> int:
        """Export."""
        return n


importing = app.register_task(Import())
assert_type(importing, Import)
assert_type(importing.delay(7), ReliableResult)
assert_type(Export().run(7), int)
plain_task: Task[Any, Any] = Export()

# -- presets ---------------------------------------------------------------------------------

merged = presets.QUICK | presets.time_limit(hard=60) | presets.rate_limit("100/s")
assert_type(merged, presets.Preset)
assert_type(merged["time_limit"], int)
assert_type(presets.STANDARD["retrying"], tenacity.Retrying)

# -- errors ----------------------------------------------------------------------------------

errors: list[type[ReliableError]] = [
    ConfigError,
    DuplicateTaskError,
    LockError,
    LockLost,
    MissingExtra,
    RetriesExhausted,
    ScriptError,
    StoreError,
    StoreUnavailable,
    UnsupportedCelery,
]
warning: type[UserWarning] = ReliableWarning


def handle() -> None:
    """Look at each error's data."""
    try:
        send_invoice.delay(7)
    except DuplicateTaskError as duplicate:
        assert_type(duplicate.key, str)
        assert_type(duplicate.owner, str)
        assert_type(duplicate.expires_in, float)
    except LockLost as lost:
        assert_type(lost.key, str)
        assert_type(lost.task_id, str)
        assert_type(lost.owner, str | None)
    except StoreUnavailable as away:
        assert_type(away.url, str)
        assert_type(away.reason, str)
    except ScriptError as refused:
        assert_type(refused.script, str)
        assert_type(refused.reason, str)
    except RetriesExhausted as exhausted:
        assert_type(exhausted.attempts, int)
        assert_type(exhausted.result, str)
    except MissingExtra as missing:
        assert_type(missing.package, str)
        assert_type(missing.extra, str)


def test_of_a_user() -> None:
    """Use the fake."""
    with fake_redis():
        assert send_invoice.delay(7).id == send_invoice.delay(7).id
