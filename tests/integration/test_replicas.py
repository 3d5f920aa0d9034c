"""reliable_wait_replicas: what a call or a claim says when the replica has not got it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks import ReliableTask, apply_reliable_config, once
from reliable_tasks._once.locks import locks_of
from reliable_tasks.demo._server import EmbeddedServer
from reliable_tasks.errors import StoreUnavailable
from tests.support import Proxy, wait_until
from tests.support.redis_variants import needs

SAYS_WHY = "only 0 of 1 replicas have the write"


class Pair:
    """A master with one replica, and an app that waits for it."""

    def __init__(self, master: EmbeddedServer, replica: EmbeddedServer, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = redis.Redis(port=master.port)
        self._replica = replica
        wait_until(lambda: self.client.execute_command("WAIT", 1, 1000), 20)
        self.app = Celery("replicas", broker=proxy.url(), set_as_current=False)
        self.app.conf.update(reliable_wait_replicas=1, reliable_store_timeout=1)
        apply_reliable_config(self.app)

        @self.app.task(name="plain", base=ReliableTask, shared=False)
        def plain(number: int) -> None: ...

        @self.app.task(name="claimed", base=ReliableTask, shared=False)
        @once(key="{number}")
        def claimed(number: int) -> None: ...

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop the replica: it stays connected, and takes nothing."""
        os.kill(self._replica.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._replica.pid, signal.SIGCONT)


@pytest.fixture(params=["the embedded server", "redis-server"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """By the last write of a connection, or by its last command: servers count in two ways."""
    binary = needs("redis-server") if request.param == "redis-server" else None
    with EmbeddedServer(binary=binary) as master:
        follows = ["--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0"]
        with EmbeddedServer(binary=binary, args=follows) as replica, Proxy(master.port) as proxy:
            pair = Pair(master, replica, proxy)
            yield pair
            pair.app.close()
            pair.client.close()


@pytest.mark.parametrize("task", ["plain", "claimed"])
@pytest.mark.parametrize("reply", ["arrives", "is lost"])
def test_a_replica_that_hangs_is_an_error(pair: Pair, task: str, reply: str) -> None:
    """However often the call is tried, and over whichever connection, it has not got it."""
    pair.app.tasks[task].delay(1)
    with pair.hanging():
        if reply == "is lost":
            pair.proxy.lose_replies(b"WAIT")
        with pytest.raises(OperationalError, match=SAYS_WHY):
            pair.app.tasks[task].delay(2)
    assert pair.client.llen("celery") == 2, "it is queued all the same, once"


def test_a_claim_is_waited_for_too(pair: Pair) -> None:
    """A run whose claim a failover would forget does not begin; nor does a call elsewhere."""
    claims = locks_of(pair.app).claims
    call = {"owner": "one", "attempt": 0, "ttl": 60.0, "task": "claimed"}
    assert claims.acquire("key", token="t", **call).owner == "one"
    with pair.hanging():
        with pytest.raises(StoreUnavailable, match=SAYS_WHY):
            claims.enter("key", holder="h", lease=60.0, **call)
        with pytest.raises(StoreUnavailable, match=SAYS_WHY):
            claims.acquire("another", token="t", **call)
    assert claims.enter("key", holder="h", lease=60.0, **call).owner == "one"
