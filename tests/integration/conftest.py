"""Servers that the tests of one module share, so that they can share workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.scene import Scene

StartScene = Callable[..., Scene]


@pytest.fixture(scope="module")
def module_redis() -> Iterator[EmbeddedServer]:
    """A real server of the module's own."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def module_scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartScene]:
    """Make scenes that last as long as the module's tests."""
    with ExitStack() as stack:

        def start(broker: str, backend: str | None, **options: Any) -> Scene:
            directory = tmp_path_factory.mktemp("scene")
            return stack.enter_context(Scene(directory, broker, backend, **options))

        yield start


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[StartScene]:
    """Make scenes that last as long as the test."""
    with ExitStack() as stack:
        count = 0

        def start(broker: str, backend: str | None, **options: Any) -> Scene:
            nonlocal count
            count += 1
            directory = tmp_path / f"scene-{count}"
            directory.mkdir()
            return stack.enter_context(Scene(directory, broker, backend, **options))

        yield start


def other_database(server: EmbeddedServer, number: int = 1) -> str:
    """Return the URL of another database of a server."""
    return f"redis://127.0.0.1:{server.port}/{number}"
