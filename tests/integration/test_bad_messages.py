"""Messages that are no task's, or are wrong in part: each concerns itself alone."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any
from uuid import uuid4

import pytest
import redis

from reliable_tasks import dead_letters
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, one_slot_in_each
from tests.integration.scene import Scene
from tests.support import wait_until

POOLS = ["prefork", "threads"]


@pytest.fixture(scope="module", params=POOLS)
def scene(
    request: pytest.FixtureRequest, module_redis: EmbeddedServer, module_scenes: StartScene
) -> Scene:
    """One worker of each kind with a single slot, which takes all the messages."""
    return one_slot_in_each(POOLS, request.param, module_redis, module_scenes)


@pytest.fixture
def broker(scene: Scene) -> redis.Redis:
    """A client of the broker's database."""
    return redis.Redis.from_url(scene.app.conf.broker_url, decode_responses=True)


def _message(
    task_id: str,
    body: bytes | None = b'[["name"], {}, {}]',
    *,
    without: str | None = None,
    raw: str | None = None,
    kind: str = "application/json",
    properties: dict[str, Any] | None = None,
    **headers: Any,
) -> str:
    """Return a message as it lies in the queue, and as Celery would have written it, but."""
    all_headers = {
        "lang": "py",
        "task": "sleep",
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
        "retries": 0,
        "timelimit": [None, None],
        "eta": None,
        "expires": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "test",
        **headers,
    }
    all_headers.pop(without or "", None)
    message = {
        "body": raw or b64encode(body or b"").decode(),
        "content-encoding": "utf-8",
        "content-type": kind,
        "headers": all_headers,
        "properties": {
            "correlation_id": task_id,
            "reply_to": task_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": task_id,
            **(properties or {}),
        },
    }
    if body is None:
        del message["body"]
    return json.dumps(message)


#: What is wrong with messages that no worker can make a task of.
NO_TASKS: dict[str, dict[str, Any]] = {
    "empty body": {"body": b""},
    "null": {"body": b"null"},
    "a number": {"body": b"5"},
    "two of three parts": {"body": b"[1, 2]"},
    "no body": {"body": None},
    "half of its JSON": {"body": b"{"},
    "bad base64": {"raw": "%%%"},
    "embed is a number": {"body": b"[[], {}, 5]"},
    "unknown content type": {"body": b"xx", "kind": "application/x-unknown"},
    "refused content type": {"body": b"xx", "kind": "application/x-python-serialize"},
    "no id": {"without": "id"},
    "task is a list": {"task": ["sleep"]},
    "time limit is a word": {"timelimit": "x"},
    "time limits are words": {"timelimit": ["a", 1]},
    "stamped_headers is a number": {"stamped_headers": 5},
    "delivery_info is a list": {"properties": {"delivery_info": [1]}},
    "plain task, empty body": {"body": b"", "task": "plain"},
    "plain task, null": {"body": b"null", "task": "plain"},
    "plain task, no id": {"without": "id", "task": "plain"},
}

#: What is wrong with messages that name a task: it fails, or there is none.
OTHERS: dict[str, dict[str, Any]] = {
    "kwargs is a list": {"body": b"[[], [], {}]"},
    "unknown task": {"task": "nobody's"},
    "unknown task, no body": {"body": None, "task": "nobody's"},
}


@pytest.mark.parametrize("wrong", NO_TASKS.values(), ids=NO_TASKS)
def test_a_message_that_is_no_tasks_is_set_apart(
    scene: Scene, broker: redis.Redis, wrong: dict[str, Any]
) -> None:
    """It is kept whole as a dead letter, the worker takes the next task, and nothing is held."""
    task_id = str(uuid4())

    def count() -> int:
        return dead_letters.count(app=scene.app, cause="undecodable")

    before = count()
    broker.lpush("celery", _message(task_id, **wrong))
    wait_until(
        lambda: count() > before or not scene.workers[0].running,
        10,
        lambda: f"the message set apart\n{scene.logs}",
    )
    _runs_the_next(scene, broker)
    found = dead_letters.list(app=scene.app, cause="undecodable")
    every = [broker.hget(f"reliable:dead:letter:{letter.id}", "message") for letter in found]
    (apart,) = (one for one in every if task_id in one)
    message = json.loads(apart)
    sent = json.loads(_message(task_id, **wrong))
    assert message["headers"] == sent["headers"]
    assert message.get("body") == sent.get("body")
    assert count() == before + 1


@pytest.mark.parametrize("wrong", OTHERS.values(), ids=OTHERS)
def test_a_message_that_names_a_task_ends_itself_alone(
    scene: Scene, broker: redis.Redis, wrong: dict[str, Any]
) -> None:
    """The worker takes the next task, and nothing is held."""
    broker.lpush("celery", _message(str(uuid4()), **wrong))
    _runs_the_next(scene, broker)


def _runs_the_next(scene: Scene, broker: redis.Redis) -> None:
    name = uuid4().hex[:8]
    result = scene.call("sleep", name)
    scene.wait_starts(name, timeout=8)
    assert result.get(timeout=5) == name
    wait_until(
        lambda: not broker.exists("unacked", "celery", "reliable:leases"),
        8,
        lambda: f"nothing held\n{scene.logs}",
    )
    assert scene.workers[0].running, scene.logs
    assert scene.starts(name) == 1
