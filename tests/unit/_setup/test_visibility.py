"""The visibility timeout follows from the app's own limits."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity
from celery import Celery

from reliable_tasks import ReliableTask, recommended_visibility_timeout


@pytest.fixture
def app() -> Celery:
    """An app with a prefetch of one."""
    app = Celery(broker="redis://h", set_as_current=False)
    app.conf.worker_prefetch_multiplier = 1
    return app


def add(app: Celery, name: str, body: Any = None, **options: Any) -> None:
    """Add a task."""

    def nothing() -> None:
        pass

    app.task(body or nothing, name=name, shared=False, **options)


def test_it_is_the_longest_task_and_a_margin(app: Celery) -> None:
    """And it says which task that is."""
    add(app, "short", time_limit=10)
    add(app, "long", time_limit=300)
    found = recommended_visibility_timeout(app)
    assert found.seconds == 310
    assert found.reasons == ("300 s hard limit of long", "10 s margin")
    assert found.unlimited == ()
    assert str(found) == "visibility_timeout = 310 s: 300 s hard limit of long; 10 s margin"


def test_a_limit_for_all_tasks_counts(app: Celery) -> None:
    """``task_time_limit`` is the limit of each task that has none."""
    app.conf.task_time_limit = 120
    add(app, "t")
    assert recommended_visibility_timeout(app).seconds == 130


def test_what_waits_in_the_prefetch_counts(app: Celery) -> None:
    """A message waits for those before it, each as long as it may take."""
    app.conf.worker_prefetch_multiplier = 4
    add(app, "t", time_limit=100)
    found = recommended_visibility_timeout(app)
    assert found.seconds == 410
    assert "3 x as much waiting in the prefetch" in found.reasons


@pytest.mark.parametrize("multiplier", [0, None])
def test_an_unbounded_prefetch_is_not_counted(app: Celery, multiplier: Any) -> None:
    """No number would be enough; it is warned about elsewhere."""
    app.conf.worker_prefetch_multiplier = multiplier
    add(app, "t", time_limit=100)
    assert recommended_visibility_timeout(app).seconds == 110


def test_the_longest_countdown_counts(app: Celery) -> None:
    """A worker holds a message while it waits for its time."""
    add(app, "t", time_limit=100)
    found = recommended_visibility_timeout(app, longest_countdown=50)
    assert found.seconds == 160
    assert "50 s the longest countdown, as stated" in found.reasons
    app.conf.reliable_longest_countdown = 60
    assert recommended_visibility_timeout(app).seconds == 170
    assert recommended_visibility_timeout(app, longest_countdown=0).seconds == 110


def calls_retry(self: Any) -> None:
    """A body that retries."""
    raise self.retry()


@pytest.mark.parametrize(
    ("options", "delay", "reason"),
    [
        (
            {
                "base": ReliableTask,
                "retrying": [tenacity.wait_fixed(40), tenacity.stop_after_attempt(3)],
            },
            40,
            "longest retry wait of t",
        ),
        (
            {"autoretry_for": (OSError,), "default_retry_delay": 70},
            70,
            "longest autoretry delay of t",
        ),
        (
            {"autoretry_for": (OSError,), "retry_backoff": True, "retry_backoff_max": 90},
            90,
            "longest autoretry delay of t",
        ),
        (
            {"autoretry_for": (OSError,), "retry_backoff": True},
            600,
            "longest autoretry delay of t",
        ),
        (
            {"body": calls_retry, "bind": True, "default_retry_delay": 20},
            20,
            "default_retry_delay of t",
        ),
        (
            {"base": ReliableTask, "body": calls_retry, "bind": True},
            180,
            "default_retry_delay of t",
        ),
    ],
)
def test_retry_delays_count(app: Celery, options: Any, delay: int, reason: str) -> None:
    """A retry waits in a worker too."""
    add(app, "t", time_limit=100, **options)
    found = recommended_visibility_timeout(app)
    assert found.seconds == 110 + delay
    assert f"{delay} s {reason}" in found.reasons


def test_a_rate_limit_counts(app: Celery) -> None:
    """What a worker holds at once has to wait for its turn."""
    app.conf.worker_concurrency = 4
    add(app, "t", time_limit=100, rate_limit="2/m")
    found = recommended_visibility_timeout(app)
    assert found.seconds == 230
    assert "120 s for 4 held messages at 2/m (t)" in found.reasons
    add(app, "free", time_limit=100, rate_limit="0/s")
    assert recommended_visibility_timeout(app).seconds == 230


def test_only_the_longest_delay_counts(app: Celery) -> None:
    """A message waits for one of them."""
    add(app, "t", time_limit=100, autoretry_for=(OSError,), default_retry_delay=70)
    assert recommended_visibility_timeout(app, longest_countdown=50).seconds == 180


def test_a_wait_that_cannot_be_known_is_left_out(app: Celery) -> None:
    """The user states it as a countdown."""
    wait = tenacity.wait_exception(lambda error: 5)
    add(app, "t", time_limit=100, base=ReliableTask, retrying=wait)
    assert recommended_visibility_timeout(app).seconds == 110


def test_a_task_without_a_limit_is_taken_for_an_hour(app: Celery) -> None:
    """And named, for no number is safe for it."""
    add(app, "limited", time_limit=100)
    add(app, "endless")
    found = recommended_visibility_timeout(app)
    assert found.seconds == 3610
    assert found.unlimited == ("endless",)
    assert found.reasons[0] == "3600 s because 1 task has no hard limit"


def test_a_longer_limit_beside_it_counts(app: Celery) -> None:
    """An hour is a guess; a limit is known."""
    add(app, "long", time_limit=7200)
    add(app, "endless")
    found = recommended_visibility_timeout(app)
    assert found.seconds == 7210
    assert found.unlimited == ("endless",)


@pytest.mark.parametrize(("stated", "seconds"), [(200, 210), (50, 110)])
def test_the_user_can_state_the_longest_task(app: Celery, stated: int, seconds: int) -> None:
    """Then no task is without a limit; a longer hard limit still counts."""
    add(app, "limited", time_limit=100)
    add(app, "endless")
    found = recommended_visibility_timeout(app, longest_task=stated)
    assert (found.seconds, found.unlimited) == (seconds, ())
    app.conf.reliable_longest_task = stated
    assert recommended_visibility_timeout(app).seconds == seconds


def test_an_app_without_tasks_gets_celerys_default(app: Celery) -> None:
    """There is nothing that it could follow from."""
    found = recommended_visibility_timeout(app)
    assert found.seconds == 3610
    assert found.reasons[0] == "3600 s because no tasks are known"


def test_the_margin_is_a_setting(app: Celery) -> None:
    """Fractions are rounded up."""
    app.conf.reliable_visibility_margin = 2.5
    add(app, "t", time_limit=100)
    assert recommended_visibility_timeout(app).seconds == 103
