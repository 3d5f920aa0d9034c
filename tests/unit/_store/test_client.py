"""How a Redis is reached: URLs, TLS, Sentinel, sockets, forks, and what is never shown."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.sentinel import SentinelConnectionPool

from reliable_tasks import ConfigError
from reliable_tasks._store import client as client_module
from reliable_tasks._store.client import (
    ServerAddress,
    building_clients_with,
    connect,
    forget_clients,
    is_redis_url,
    shown,
)
from reliable_tasks.demo._server import EmbeddedServer


@pytest.fixture(autouse=True)
def no_clients_left() -> Iterator[None]:
    """Leave no connection behind."""
    yield
    forget_clients()


def arguments(url: str, **options: Any) -> dict[str, Any]:
    """What the client's connections are made with."""
    server = connect(ServerAddress(url, timeout=3.0, options=options)).redis
    found: dict[str, Any] = server.connection_pool.connection_kwargs
    return found


def test_a_plain_url_is_read() -> None:
    """Host, port, database, user and a percent-encoded password come from the URL."""
    found = arguments("redis://us%65r:p%40ss%2Fw@example.org:6380/3")
    assert (found["host"], found["port"], found["db"]) == ("example.org", 6380, 3)
    assert (found["username"], found["password"]) == ("user", "p@ss/w")


def test_commands_are_bounded_in_time_and_never_repeated() -> None:
    """Which commands may be repeated is not for redis-py to say."""
    found = arguments("redis://h")
    assert (found["socket_timeout"], found["socket_connect_timeout"]) == (3.0, 2.0)
    assert found["retry"].get_retries() == 0
    assert found["decode_responses"] is True


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("rediss://h", {}, "required"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", {}, "none"),
        ("rediss://h?ssl_cert_reqs=none", {}, "none"),
        ("rediss://h?ssl_cert_reqs=CERT_OPTIONAL", {}, "optional"),
        ("rediss://h?ssl_cert_reqs=required", {}, "required"),
        ("rediss://h", {"ssl": {"ssl_cert_reqs": ssl.CERT_NONE}}, "none"),
        ("rediss://h", {"ssl": {"ssl_cert_reqs": ssl.CERT_OPTIONAL}}, "optional"),
        ("rediss://h", {"ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED}}, "required"),
        ("rediss://h", {"ssl": {"ssl_cert_reqs": None}}, "none"),
        ("rediss://h", {"ssl": True}, "required"),
        ("redis://h", {"ssl": True}, "required"),
        ("redis://h", {"ssl": {"ssl_cert_reqs": "none"}}, "none"),
        # What stands in the URL is more specific.
        (
            "rediss://h?ssl_cert_reqs=none",
            {"ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED}},
            "none",
        ),
    ],
)
def test_certificates_are_checked_as_celery_was_told(
    url: str, options: dict[str, Any], expected: str
) -> None:
    """All spellings of Celery's TLS settings mean the same here; silence means checked."""
    address = ServerAddress(url, timeout=3.0, options=options)
    pool = connect(address).redis.connection_pool
    assert pool.connection_class is redis.SSLConnection
    assert pool.connection_kwargs["ssl_cert_reqs"] == expected
    connection: Any = pool.connection_class(**pool.connection_kwargs)
    assert connection.cert_reqs == getattr(ssl, f"CERT_{expected.upper()}")


def test_tls_files_are_passed_on() -> None:
    """Certificates from the URL and from Celery's settings reach the connection."""
    found = arguments(
        "rediss://h/2?ssl_ca_certs=/a/ca.pem&ssl_check_hostname=false&socket_keepalive=1",
        ssl={"ssl_keyfile": "/a/key.pem", "ssl_certfile": "/a/cert.pem"},
    )
    assert (found["ssl_ca_certs"], found["ssl_check_hostname"]) == ("/a/ca.pem", False)
    assert (found["ssl_keyfile"], found["ssl_certfile"]) == ("/a/key.pem", "/a/cert.pem")
    assert (found["db"], found["socket_keepalive"]) == (2, True)


def test_an_unknown_certificate_rule_is_refused() -> None:
    """A wrong word must not switch the check off."""
    with pytest.raises(ConfigError, match="ssl_cert_reqs = 'maybe'"):
        arguments("rediss://h?ssl_cert_reqs=maybe")


@pytest.mark.parametrize(
    "url",
    ["unix://{path}?db=2", "socket://{path}?virtual_host=2", "redis+socket://{path}?db=2"],
)
def test_a_unix_socket_is_reached(redis_server: EmbeddedServer, url: str) -> None:
    """Every spelling of a socket that Celery and redis-py know leads to the same database."""
    path = redis_server.socket_path
    server = connect(ServerAddress(url.format(path=path), timeout=3.0)).redis
    server.set("here", 1)
    assert server.info("keyspace")["db2"]["keys"] == 1  # type: ignore[index]


def test_a_unix_socket_takes_credentials() -> None:
    """User and password stand where a host would have them."""
    found = arguments("redis+socket://user:p%40ss@/run/redis.sock")
    assert (found["path"], found["db"]) == ("/run/redis.sock", 0)
    assert (found["username"], found["password"]) == ("user", "p@ss")


def test_a_sentinel_url_leads_to_the_master() -> None:
    """Several nodes, the master's credentials and the sentinels' own are told apart."""
    address = ServerAddress(
        "sentinel://:p%40ss@s1:26380/4;sentinel://s2;sentinel://:p%40ss@s3:26382/4",
        timeout=3.0,
        options={
            "master_name": "prime",
            "min_other_sentinels": 1,
            "sentinel_kwargs": {"password": "sentinels-own"},
        },
    )
    server = connect(address).redis
    pool = server.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "prime"
    assert (pool.connection_kwargs["password"], pool.connection_kwargs["db"]) == ("p@ss", 4)
    manager = pool.sentinel_manager
    assert manager.min_other_sentinels == 1
    nodes = [one.connection_pool.connection_kwargs for one in manager.sentinels]
    assert [(n["host"], n["port"]) for n in nodes] == [("s1", 26380), ("s2", 26379), ("s3", 26382)]
    assert {n["password"] for n in nodes} == {"sentinels-own"}
    assert {n["socket_timeout"] for n in nodes} == {3.0}


def test_a_sentinel_master_can_have_a_user_and_tls() -> None:
    """An ACL user and TLS apply to the master behind the sentinels."""
    address = ServerAddress(
        "sentinel://us%65r:pw@s1:1",
        timeout=3.0,
        options={"master_name": "m", "ssl": {"ssl_cert_reqs": ssl.CERT_NONE}},
    )
    pool = connect(address).redis.connection_pool
    assert issubclass(pool.connection_class, redis.SSLConnection)
    assert pool.connection_kwargs["username"] == "user"
    assert pool.connection_kwargs["ssl_cert_reqs"] == "none"


def test_a_sentinel_master_may_need_no_password() -> None:
    """Then none is sent."""
    address = ServerAddress("sentinel://s1;sentinel://s2", 3.0, {"master_name": "m"})
    found = connect(address).redis.connection_pool.connection_kwargs
    assert found.get("password") is None
    assert found["db"] == 0


def test_a_sentinel_url_needs_a_masters_name() -> None:
    """The message says where to set it, and shows no password."""
    with pytest.raises(ConfigError, match=r"master_name.*broker_transport_options") as caught:
        connect(ServerAddress("sentinel://:secret@s1", timeout=3.0))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://u:secret@h//", "its scheme must be one of redis, rediss"),
        ("nonsense", "is not the URL of a Redis"),
        ("redis://u:secret@h:port/0", "is not the URL of a Redis"),
        ("unix:///run/redis.sock?db=one", "'one' is not the number of a Redis database"),
        ("sentinel://h/one", "'one' is not the number of a Redis database"),
    ],
)
def test_a_wrong_url_is_refused(url: str, words: str) -> None:
    """The message says what is wrong, without the password."""
    with pytest.raises(ConfigError, match=words) as caught:
        connect(ServerAddress(url, timeout=3.0, options={"master_name": "m"}))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h", "redis://:**@h"),
        ("redis://user:secret@h/0", "redis://user:**@h/0"),
        ("redis://user:se@cret@h/0", "redis://user:**@h/0"),
        (
            "sentinel://:secret@a;sentinel://u:secret@b",
            "sentinel://:**@a;sentinel://u:**@b",
        ),
        ("disabled", "disabled"),
    ],
)
def test_a_password_is_never_shown(url: str, expected: str) -> None:
    """Users and hosts help whoever reads a message; passwords do not."""
    assert shown(url) == expected


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("redis://h", True),
        ("rediss://h", True),
        ("sentinel://h", True),
        ("unix:///s", True),
        ("socket:///s", True),
        ("redis+socket:///s", True),
        ("amqp://h", False),
        ("redis", False),
        ("", False),
    ],
)
def test_a_redis_url_is_told_from_others(url: str | None, answer: bool) -> None:
    """Only what Celery would talk Redis to counts."""
    assert is_redis_url(url) is answer


def test_one_client_serves_one_address() -> None:
    """The same address gives the same client, another one another."""
    address = ServerAddress("redis://h", timeout=3.0)
    first = connect(address)
    assert connect(ServerAddress("redis://h", timeout=3.0)) is first
    assert connect(ServerAddress("redis://h", timeout=4.0)) is not first
    assert connect(ServerAddress("redis://h", 3.0, {"global_keyprefix": "x"})) is not first
    assert first.shown_url == "redis://h"


def test_threads_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that meet at the first use build one client between them."""
    built = []
    meeting = threading.Barrier(4, timeout=5)

    def build(address: ServerAddress) -> Any:
        built.append(address)
        return redis.Redis()

    def use() -> None:
        meeting.wait()
        connect(ServerAddress("redis://h", timeout=3.0))

    with building_clients_with(build):
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert len(built) == 1


def test_a_forked_child_has_clients_of_its_own(redis_url: str) -> None:
    """The child of a fork uses no socket of its parent, not even to close it."""
    address = ServerAddress(redis_url, timeout=3.0)
    parent = connect(address)
    parents_id: Any = parent.redis.client_id()
    reader, writer = os.pipe()
    # Held, as by a thread that is just connecting: the child must not wait for it.
    with client_module._lock:
        pid = os.fork()
        if pid == 0:
            try:
                child = connect(address)
                answer = f"{child is parent} {child.redis.client_id()}"
                os.write(writer, answer.encode())
            finally:
                os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    same, childs_id = os.read(reader, 100).decode().split()
    os.close(reader)
    assert same == "False"
    assert int(childs_id) != parents_id
    assert parent.redis.client_id() == parents_id


def test_forgotten_clients_are_closed(redis_url: str) -> None:
    """After forgetting, the next use makes a new client."""
    address = ServerAddress(redis_url, timeout=3.0)
    first = connect(address)
    first.redis.ping()
    forget_clients()
    assert connect(address) is not first


def test_another_builder_holds_for_its_block_only() -> None:
    """A test's server is gone when the test is."""
    address = ServerAddress("redis://h", timeout=3.0)
    before = connect(address)
    own = redis.Redis()
    with building_clients_with(lambda _: own):
        assert connect(address).redis is own
    after = connect(address)
    assert after.redis is not own
    assert after is not before
