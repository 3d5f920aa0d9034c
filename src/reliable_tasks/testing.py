"""For the tests of your own project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from reliable_tasks._store.client import ServerAddress, building_clients_with
from reliable_tasks.errors import MissingExtra

__all__ = ["fake_redis"]


@contextmanager
def fake_redis() -> Iterator[None]:
    """Keep all `@once` claims in this process' memory, whatever lock Redis is configured.

    Each URL is a server of its own, empty at the start and gone at the end. Broker and result
    backend are not touched: use ``task_always_eager``, ``task.apply()`` or kombu's ``memory://``
    for those. Other processes, real workers among them, do not see the claims.

    Raises:
        MissingExtra: fakeredis is not installed; the extra ``test`` brings it.

    Example:
        ::

            def test_a_second_call_is_a_duplicate():
                with fake_redis():
                    first = send_invoice.delay(7)
                    assert send_invoice.delay(7).id == first.id
    """
    try:
        import fakeredis

        import_module("lupa")  # fakeredis runs scripts with it, and says nothing without it
    except ImportError:
        raise MissingExtra("fakeredis[lua]", "test") from None
    servers: dict[str, Any] = {}

    def build(address: ServerAddress) -> Any:
        server = servers.setdefault(address.url, fakeredis.FakeServer())
        return fakeredis.FakeRedis(server=server, decode_responses=True)

    with building_clients_with(build):
        yield
