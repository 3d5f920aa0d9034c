"""What keeps one page's examples from the next test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reliable_tasks._broker import keeper
from tests.support import wait_until


@pytest.fixture(autouse=True)
def no_keepers_left() -> Iterator[None]:
    """Stop the keepers of this process: they would sweep in the next test's server."""
    yield
    keepers = list(keeper._keepers.values())
    for one in keepers:
        one.stop()
    wait_until(lambda: not any(one._is_running for one in keepers), 10)
