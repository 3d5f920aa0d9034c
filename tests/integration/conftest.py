"""Servers that the tests of one module share, so that they can share workers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import adverse, poison
from tests.integration.scene import Scene
from tests.support import WorkerProcess, wait_until

StartScene = Callable[..., Scene]

#: What the `scene` can be on.
BROKERS = ["our transport", "stock kombu", "RabbitMQ"]
on_all_brokers = pytest.mark.parametrize("scene", BROKERS, indirect=True)


@pytest.fixture(scope="module")
def module_redis() -> Iterator[EmbeddedServer]:
    """A real server of the module's own."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def module_scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartScene]:
    """Make scenes that last as long as the module's tests."""
    with _scenes(lambda: tmp_path_factory.mktemp("scene")) as start:
        yield start


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[StartScene]:
    """Make scenes that last as long as the test."""
    with _scenes(lambda: Path(tempfile.mkdtemp(prefix="scene-", dir=tmp_path))) as start:
        yield start


@pytest.fixture
def transport_options() -> dict[str, Any]:
    """Options of the `scene`'s transport where it is stock kombu's."""
    return {}


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    scenes: StartScene,
    redis_server: EmbeddedServer,
    transport_options: dict[str, Any],
) -> Scene:
    """The app of crashes and failures, on the broker that the test names.

    Modules about something else have a scene of their own.
    """
    broker = getattr(request, "param", BROKERS[0])
    url = redis_server.url
    settings: dict[str, Any] = {}
    if broker == "RabbitMQ":
        url = request.getfixturevalue("rabbitmq_url")
    elif broker == "stock kombu":
        settings = {"reliable_broker": "stock", "broker_transport_options": transport_options}
    return scenes(url, other_database(redis_server), module=poison, settings=settings)


@contextmanager
def _scenes(next_directory: Callable[[], Path]) -> Iterator[StartScene]:
    made: list[Scene] = []
    with ExitStack() as stack:

        def start(broker: str, backend: str | None, **options: Any) -> Scene:
            scene = stack.enter_context(Scene(next_directory(), broker, backend, **options))
            made.append(scene)
            return scene

        yield start
        # At the same time: a green worker takes some seconds.
        WorkerProcess.stop_all([worker for scene in made for worker in scene.workers])


def other_database(server: EmbeddedServer, number: int = 1) -> str:
    """Return the URL of another database of a server."""
    return f"redis://127.0.0.1:{server.port}/{number}"


def lose_connections(worker: WorkerProcess, broker: redis.Redis, *, waits: bool = True) -> None:
    """Kill all connections of a broker, and wait until a worker has connected again, or do not."""
    before = worker.log.count("Connected to redis")
    broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    broker.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    if waits:
        wait_until(
            lambda: worker.log.count("Connected to redis") > before,
            15,
            lambda: f"a new connection\n{worker.log[-3000:]}",
        )


def one_slot_in_each(
    pools: list[str], pool: str, server: EmbeddedServer, start: StartScene
) -> Scene:
    """Start the app of strange tasks with a worker of one slot, on databases of its pool's own."""
    number = 2 * pools.index(pool)
    urls = (other_database(server, n) for n in (number, number + 1))
    scene = start(*urls, limit=adverse.LIMIT, module=adverse)
    scene.worker(pool=pool, concurrency=1)
    return scene
