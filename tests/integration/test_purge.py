"""Purged messages take their claims with them, wherever those are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import once_fleet, shop
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def locks() -> Iterator[EmbeddedServer]:
    """A Redis for claims alone."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def scene(redis_server: EmbeddedServer, locks: EmbeddedServer, scenes: StartScene) -> Scene:
    """An app whose claims are in another Redis than its messages, three of which wait."""
    scene = scenes(redis_server.url, None, settings={"reliable_redis_url": locks.url})
    for number in range(3):
        scene.call("act", f"purged {number}")
    scene.call("bare", "purged")
    scene.call("until_expired", "purged")
    assert len(scene.claims.names()) == 4
    return scene


def test_claims_in_another_redis(scene: Scene) -> None:
    """All are free, but for that of a window, which nobody ends."""
    assert scene.app.control.purge() == 5
    (left,) = scene.claims.names()
    assert "until_expired" in left
    assert not scene.call("act", "purged 0").duplicate


def test_the_claim_of_another_call_stays(scene: Scene) -> None:
    """The key changed hands while the message waited."""
    scene.claims.free(scene.claim_name("purged 0"), **_seen(scene, "purged 0"))
    scene.run_elsewhere("purged 0", "somebody")
    scene.app.control.purge()
    assert scene.claim("purged 0")["owner"] == "somebody"


def _seen(scene: Scene, name: str) -> dict[str, str]:
    claim = scene.claim(name)
    return {"owner": claim["owner"], "fence": claim["fence"]}


def test_by_the_command_line(
    scene: Scene, redis_server: EmbeddedServer, locks: EmbeddedServer
) -> None:
    """Which needs none of the tasks for anything else."""
    env = {
        **os.environ,
        "RT_BROKER_URL": redis_server.url,
        "RT_SETTINGS": f'{{"reliable_redis_url": "{locks.url}"}}',
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "src")]),
    }
    command = [sys.executable, "-m", "celery", "-A", shop.__name__, "purge", "-f"]
    purged = subprocess.run(
        command, env=env, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "Purged 5 messages" in purged.stdout
    (left,) = scene.claims.names()
    assert "until_expired" in left


def test_a_lock_redis_that_is_away(scene: Scene, locks: EmbeddedServer) -> None:
    """The messages are gone all the same; the claims lapse."""
    locks.stop()
    assert scene.app.control.purge() == 5


def test_locks_of_celery_once(redis_server: EmbeddedServer, scenes: StartScene) -> None:
    """Under celery-once's own keys."""
    urls = [other_database(redis_server, number) for number in (0, 1)]
    scene = scenes(*urls, limit=30, module=once_fleet)
    scene.app.tasks["slow_task"].delay()
    with redis.Redis.from_url(str(scene.app.conf.result_backend)) as server:
        assert server.exists("qo_slow_task")
        assert scene.app.control.purge() == 1
        assert not server.exists("qo_slow_task")
