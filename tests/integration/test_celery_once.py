"""celery-once's users, with one import changed; and half of them with none changed yet."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import celery_once
import pytest
import redis
from celery import states
from celery.result import EagerResult

from reliable_tasks.contrib.celery_once import AlreadyQueued
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import once_fleet
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

#: How many calls a fleet gets.
CALLS = 1000
#: More than the stock workers hold: an idle one of theirs is quicker than ours.
KEYS = 60


@pytest.fixture(scope="module")
def shop(module_redis: EmbeddedServer, module_scenes: StartScene) -> Scene:
    """A worker for the README's examples."""
    urls = (other_database(module_redis, number) for number in (0, 1))
    scene = module_scenes(*urls, limit=30, module=once_fleet)
    scene.worker(concurrency=4)
    return scene


def wait_unlocked(scene: Scene, key: str) -> None:
    """Wait until a lock is free: a result is stored before."""
    with redis.Redis.from_url(str(scene.app.conf.result_backend)) as server:
        wait_until(lambda: not server.exists(key), 10, lambda: f"{key} free\n{scene.logs}")


def test_slow_task(shop: Scene) -> None:
    """Usage: a second call raises until the first has ended."""
    slow_task = shop.app.tasks["slow_task"]
    result = slow_task.delay()
    for error in (AlreadyQueued, celery_once.AlreadyQueued):
        with pytest.raises(error):
            slow_task.delay()
        with pytest.raises(error):
            slow_task.apply_async()
    assert result.get(timeout=10) == "Done!"
    wait_unlocked(shop, "qo_slow_task")
    assert slow_task.delay().get(timeout=10) == "Done!"


def test_graceful(shop: Scene) -> None:
    """By the task, and by the call."""
    graceful, slow_add = shop.app.tasks["graceful"], shop.app.tasks["slow_add"]
    result = graceful.delay()
    for again in (graceful.delay(), graceful.apply_async(once={"graceful": True})):
        assert isinstance(again, EagerResult)
        assert again.state == states.REJECTED
    assert result.get(timeout=10) == "Done!"
    first = slow_add.apply_async(args=(10, 1), once={"graceful": True})
    second = slow_add.apply_async(args=(10, 1), once={"graceful": True})
    assert (first.get(timeout=10), second.state) == (11, states.REJECTED)


def test_keys(shop: Scene) -> None:
    """One argument counts."""
    slow_add = shop.app.tasks["slow_add"]
    one = slow_add.delay(1, 1)
    with pytest.raises(AlreadyQueued):
        slow_add.delay(1, 2)
    two = slow_add.delay(2, 2)
    assert (one.get(timeout=10), two.get(timeout=10)) == (2, 4)


def test_unlock_before_run(shop: Scene) -> None:
    """The key is free when the task starts."""
    unlocked = shop.app.tasks["unlocked"]
    first = unlocked.delay()
    wait_unlocked(shop, "qo_unlocked")
    second = unlocked.delay()
    assert (first.get(timeout=10), second.get(timeout=10)) == ("Done!", "Done!")


def test_a_killed_worker_keeps_no_lock(redis_server: EmbeddedServer, scenes: StartScene) -> None:
    """With celery-once it is taken for an hour. Here the task runs again, and frees it."""
    # One Redis for all, as most have it: its leases say which runs are alive.
    scene = scenes(redis_server.url, redis_server.url, limit=60, module=once_fleet)
    scene.crew(2, concurrency=1)
    result = scene.call("example", "order", 3)
    wait_until(lambda: scene.journal.events("start", key="order"), 10, lambda: scene.logs)
    (start,) = scene.journal.events("start", key="order")
    next(w for w in scene.workers if start.pid in w.child_pids()).kill_group()
    assert result.get(timeout=20) == "order"
    assert len(scene.journal.events("start", key="order")) == 2
    wait_unlocked(scene, "qo_example_key-order")


def test_a_mixed_fleet(redis_server: EmbeddedServer, scenes: StartScene) -> None:
    """Each call that is accepted runs once, and no two with a key at once."""
    # A message waits for longer in a stock worker than it would be invisible for.
    settings = {"broker_transport_options": {"visibility_timeout": 3600}}
    urls = (redis_server.url, other_database(redis_server))
    ours, theirs = (
        scenes(*urls, limit=30, module=once_fleet, settings={"once_from": source, **settings})
        for source in (once_fleet.OURS, once_fleet.THEIRS)
    )
    # One journal.
    theirs.journal, theirs._env["RT_JOURNAL"] = ours.journal, ours._env["RT_JOURNAL"]
    for scene in (ours, theirs):
        scene.crew(2, concurrency=2)
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def call(scene: Scene, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(CALLS // 2):
            key = f"key {rng.randrange(KEYS)}"
            try:
                scene.app.tasks["example"].delay(key, rng.uniform(0.05, 0.2))
            except celery_once.AlreadyQueued:
                refused[key] += 1
            else:
                accepted[key] += 1
            time.sleep(rng.uniform(0, 0.01))

    callers = [
        threading.Thread(target=call, args=(scene, seed))
        for seed, scene in ((1, ours), (2, theirs))
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    total = accepted.total()
    assert refused.total() + total == 2 * (CALLS // 2)
    assert refused.total() > 0

    def ended() -> bool:
        return len(ours.journal.events("end")) >= total

    wait_until(ended, 60, lambda: f"{total} ends\n{ours.logs}\n{theirs.logs}")
    events = ours.journal.events()
    starts = Counter(event.data["key"] for event in events if event.name == "start")
    assert starts == accepted, "none lost, none doubled"
    assert len({event.data["id"] for event in events}) == total
    assert _most_at_once(events) == 1
    with redis.Redis.from_url(urls[1]) as server:
        wait_until(lambda: not server.keys("qo_*"), 10, lambda: f"{server.keys('qo_*')}")
    kinds = {process: _kind(process, ours, theirs) for process in {e.pid for e in events}}
    assert set(kinds.values()) == {"ours", "theirs"}, "both have worked"


def _most_at_once(events: list[Any]) -> int:
    running: Counter[str] = Counter()
    most = 0
    for event in events:
        running[event.data["key"]] += 1 if event.name == "start" else -1
        most = max(most, *running.values())
    return most


def _kind(pid: int, ours: Scene, theirs: Scene) -> str:
    for name, scene in (("ours", ours), ("theirs", theirs)):
        if any(pid in worker.child_pids() for worker in scene.workers):
            return name
    return "nobody's"
