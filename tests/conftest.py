"""Servers and workers for the tests; every one is started here and stopped here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis
from celery.result import AsyncResult
from kombu import pools

from reliable_tasks._broker import keeper
from reliable_tasks.demo._server import EmbeddedServer
from tests.support import Proxy, RabbitMQServer, WorkerProcess, wait_until

_INTEGRATION = Path(__file__).parent / "integration"
_NEEDS_RABBITMQ = {"rabbitmq_server", "rabbitmq_url"}

# A busy machine is slow, not wrong; and CI fails for what changed, not for its luck.
hypothesis.settings.register_profile(
    "reliable", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("reliable")


# With it Celery tells a server of each result that the garbage collector takes: where that server
# has been stopped since, for 20 s, and in the midst of another test.
del AsyncResult.__del__


# Before pytest-xdist reads its own mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by where they live, by what they ask for, and by what they share."""
    for item in items:
        if item.path.is_relative_to(_INTEGRATION):
            item.add_marker(pytest.mark.integration)
        needs_rabbitmq = _NEEDS_RABBITMQ.intersection(getattr(item, "fixturenames", ()))
        if needs_rabbitmq:
            item.add_marker(pytest.mark.rabbitmq)
        # A node takes long to start, and so do the workers that a module shares.
        if needs_rabbitmq or _shares_with_its_module(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _shares_with_its_module(item: pytest.Item) -> bool:
    known: Any = getattr(item, "_fixtureinfo", None)
    found = known.name2fixturedefs.values() if known else ()
    return any(one.scope == "module" for definitions in found for one in definitions)


@pytest.fixture(scope="session")
def _redis_process() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(args=["--enable-debug-command", "local"]) as server:
        yield server


@pytest.fixture
def redis_server(_redis_process: EmbeddedServer) -> EmbeddedServer:
    """A real server with nothing in it, shared by the tests of this process.

    A test may kill or restart it; the next finds it running again.
    """
    _redis_process.start()
    with redis.Redis.from_url(_redis_process.url) as client:
        client.flushall()
        client.script_flush()
    return _redis_process


@pytest.fixture
def redis_url(redis_server: EmbeddedServer) -> str:
    """The URL of an empty database; a broker, or the Redis that holds the claims."""
    return redis_server.url


@pytest.fixture
def result_url(redis_server: EmbeddedServer) -> str:
    """The URL of another empty database of the same server, for results."""
    return f"redis://127.0.0.1:{redis_server.port}/1"


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the empty database, to look at what the library wrote."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def redis_proxy(redis_server: EmbeddedServer) -> Iterator[Proxy]:
    """A connection to the server that can be broken."""
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMQServer]:
    """A real RabbitMQ node; skipped where none is installed, but never in CI."""
    try:
        server = RabbitMQServer()
    except FileNotFoundError as missing:
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run these tests. {missing}")
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def rabbitmq_url(rabbitmq_server: RabbitMQServer) -> Iterator[str]:
    """The URL of a virtual host that is this test's alone."""
    vhost = rabbitmq_server.create_vhost()
    yield rabbitmq_server.url(vhost)
    rabbitmq_server.delete_vhost(vhost)


@pytest.fixture
def start_worker(redis_url: str, result_url: str) -> Iterator[Callable[..., WorkerProcess]]:
    """Start real workers, on the test's Redis unless told otherwise, and stop them all.

    Takes what `WorkerProcess` takes.
    """
    workers: list[WorkerProcess] = []

    def start(app: str, **options: Any) -> WorkerProcess:
        worker = WorkerProcess(
            app, **{"broker_url": redis_url, "result_url": result_url, **options}
        )
        workers.append(worker)
        worker.start()
        return worker

    yield start
    WorkerProcess.stop_all(workers)


@pytest.fixture(autouse=True)
def _no_keepers_left() -> Iterator[None]:
    """Stop the keepers of this process: they would sweep in the next test's server."""
    yield
    keepers = list(keeper._keepers.values())
    for one in keepers:
        one.stop()
    wait_until(lambda: not any(one._is_running for one in keepers), 10)
    keeper._keepers.clear()


@pytest.fixture(autouse=True)
def _no_connections_left() -> Iterator[None]:
    """Close what kombu pools for all apps of a process: one killed here fails the next test's."""
    yield
    for pool in pools.connections.values():
        # With nothing left in it, `force_close_all` alone has the next to ask wait for ever.
        pool.resize(pool.limit, reset=True)
