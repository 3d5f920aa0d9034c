"""What happens between a script and its caller: refusals, lost replies, a dead server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from reliable_tasks._store.claims import Entry, Publish, Release
from reliable_tasks._store.client import ServerAddress, forget_clients
from reliable_tasks._store.scripts import load
from reliable_tasks.demo._server import EmbeddedServer
from reliable_tasks.errors import ScriptError, StoreError, StoreUnavailable
from tests.conformance.conftest import Store
from tests.support import Monitor, Proxy


@pytest.fixture(autouse=True)
def no_clients_left() -> Iterator[None]:
    """Leave no connection to a server that is gone."""
    yield
    forget_clients()


@pytest.fixture
def behind_proxy(redis_proxy: Proxy) -> Store:
    """Claims on a real server whose network can be broken."""
    return Store(ServerAddress(redis_proxy.url(), timeout=0.5))


def test_scripts_are_loaded_again_after_a_flush(store: Store) -> None:
    """A server that was restarted, or failed over, is given the scripts again."""
    store.server.script_flush()
    assert store.acquire().code is Publish.CLAIMED
    store.server.script_flush()
    assert store.enter().code is Entry.ENTERED
    store.server.script_flush()
    assert store.continue_().code is Publish.CLAIMED
    store.server.script_flush()
    assert store.abandon(token="t2")
    store.server.script_flush()
    assert store.release()[0] is Release.FREED


def test_a_script_is_sent_once(redis_url: str) -> None:
    """A known script is one command, by its hash."""
    store = Store(ServerAddress(redis_url, timeout=5.0))
    store.acquire()
    with Monitor(redis_url) as monitor:
        store.acquire()
    assert monitor.names() == ["EVALSHA"]


def test_a_script_is_read_once() -> None:
    """Loading is cached, and the hash is the one that the server computes."""
    assert load("claim_enter") is load("claim_enter")
    assert len(load("claim_enter").sha) == 40


def test_a_server_that_became_a_replica_is_left(redis_server: EmbeddedServer) -> None:
    """Its connections stay open: only a new one leads to what is the master now."""
    store = Store(ServerAddress(redis_server.url, timeout=5.0))
    before = store.server.client_id()
    with redis.Redis(port=redis_server.port) as other:
        # A replica of nothing: it refuses writes and needs no second server.
        other.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            with pytest.raises(StoreUnavailable, match=r"read ?only"):
                store.acquire()
        finally:
            other.execute_command("REPLICAOF", "NO", "ONE")
    assert store.acquire().code is Publish.CLAIMED
    assert store.server.client_id() != before


def test_a_server_without_memory_refuses(redis_server: EmbeddedServer) -> None:
    """A full server does not let a claim go unwritten."""
    store = Store(ServerAddress(redis_server.url, timeout=5.0))
    before = store.server.config_get("maxmemory")["maxmemory"]  # type: ignore[index]
    store.server.config_set("maxmemory", 1)
    try:
        with pytest.raises(ScriptError, match=r"OOM|used memory > .maxmemory"):
            store.acquire()
    finally:
        store.server.config_set("maxmemory", before)


def test_a_user_without_the_right_is_refused(redis_server: EmbeddedServer) -> None:
    """Missing rights are the server's words, not a network's failure."""
    admin = redis.Redis.from_url(redis_server.url)
    admin.acl_setuser(
        "reader", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@read", "+evalsha"]
    )
    store = Store(ServerAddress(f"redis://reader:p%40ss@127.0.0.1:{redis_server.port}/0", 5.0))
    try:
        with pytest.raises(ScriptError, match=r"(?i)noperm|permission"):
            store.acquire()
    finally:
        admin.acl_deluser("reader")
        admin.close()


def test_wrong_credentials_are_a_store_that_cannot_be_used(
    redis_server: EmbeddedServer, redis_proxy: Proxy
) -> None:
    """The error says for whom, and never shows the password."""
    url = f"redis://nobody:secret@127.0.0.1:{redis_server.port}/0"
    store = Store(ServerAddress(url, timeout=5.0))
    with (
        Monitor(redis_server.url) as monitor,
        pytest.raises(StoreUnavailable, match=r"nobody:\*\*@") as caught,
    ):
        store.acquire()
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(caught.value)
    # MONITOR shows no credentials; a connection that was refused sends nothing behind them.
    assert "EVALSHA" not in monitor.names()


def test_a_server_that_is_down_is_unavailable(behind_proxy: Store, redis_proxy: Proxy) -> None:
    """A refused connection ends in an error that says where the server was expected."""
    redis_proxy.refuse()
    with pytest.raises(StoreUnavailable) as caught:
        behind_proxy.acquire()
    assert caught.value.url == redis_proxy.url()
    assert isinstance(caught.value.__cause__, redis.ConnectionError)


def test_a_server_that_does_not_answer_is_unavailable(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """A silent network ends in the same error, after the timeout."""
    redis_proxy.black_hole()
    with pytest.raises(StoreUnavailable, match=r"(?i)time"):
        behind_proxy.acquire()


def test_a_short_outage_is_not_noticed(behind_proxy: Store, redis_proxy: Proxy) -> None:
    """Connections that were cut are made again."""
    behind_proxy.acquire()
    redis_proxy.cut()
    assert behind_proxy.enter().code is Entry.ENTERED


def test_a_lost_reply_does_not_cost_a_call_its_claim(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """The repeated script recognises its token: the caller has the key."""
    behind_proxy.claims.acquire("warm", owner="o", attempt=0, token="t", ttl=1, task="n")
    redis_proxy.lose_replies(b"EVALSHA")
    assert behind_proxy.acquire().code is Publish.CLAIMED
    assert behind_proxy.record["token"] == "t1"


def test_a_lost_reply_does_not_cost_a_start_its_place(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """Another call has taken the key that the first try had freed."""
    behind_proxy.claims.start("warm", owner="o", attempt=0, remember=1)
    behind_proxy.acquire()
    assert behind_proxy.start().code is Entry.ENTERED
    behind_proxy.acquire("two", token="t2")
    assert behind_proxy.start().code is Entry.ENTERED
    assert behind_proxy.record["owner"] == "two"


def test_lost_replies_in_the_life_of_a_task_change_nothing(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """Each step of a task with a retry is carried out once, whatever reply is lost."""
    behind_proxy.acquire()
    redis_proxy.lose_replies(b"EVAL")
    assert behind_proxy.enter().code is Entry.ENTERED
    redis_proxy.lose_replies(b"EVAL")
    assert behind_proxy.continue_().code is Publish.CLAIMED
    assert behind_proxy.release()[0] is Release.KEPT
    redis_proxy.lose_replies(b"EVAL")
    assert behind_proxy.enter(attempt=1, holder="h2").code is Entry.ENTERED
    redis_proxy.lose_replies(b"EVAL")
    # The first release ran; the second finds that there is nothing left to do.
    assert behind_proxy.release(attempt=1, holder="h2")[0] is Release.LAPSED
    assert behind_proxy.record == {}


def test_replies_that_keep_being_lost_are_an_outage(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """Repeats are bounded."""
    redis_proxy.lose_replies(b"EVAL", times=2)
    with pytest.raises(StoreUnavailable):
        behind_proxy.acquire()
    assert behind_proxy.acquire().code is Publish.CLAIMED


def test_looking_at_claims_of_a_dead_server_says_so(
    behind_proxy: Store, redis_proxy: Proxy
) -> None:
    """Reading and listing fail as the scripts do."""
    redis_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        behind_proxy.claims.read("any")
    with pytest.raises(StoreUnavailable):
        behind_proxy.claims.names()


def test_looking_at_claims_without_the_right_says_so(redis_server: EmbeddedServer) -> None:
    """A user who may run scripts and not scan is told what was refused."""
    admin = redis.Redis.from_url(redis_server.url)
    admin.acl_setuser("runner", enabled=True, nopass=True, keys=["*"], commands=["+evalsha"])
    store = Store(ServerAddress(f"redis://runner:any@127.0.0.1:{redis_server.port}/0", 5.0))
    try:
        with pytest.raises(StoreError, match="refused to list claims"):
            store.claims.names()
    finally:
        admin.acl_deluser("runner")
        admin.close()
