"""One Redis client per process and server.

A client must not cross a fork: two processes would read each other's replies from one socket.
redis-py's pool notices a changed pid by itself, but only between commands; a fork in the middle
of one (a thread publishes while the worker forks a child) leaves a lock held in the child for
ever. So the child forgets the parent's clients without touching them: closing a shared socket
would speak to the server in the parent's name.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from reliable_tasks._store.lines import Lines
from reliable_tasks.errors import ConfigError

__all__ = [
    "Client",
    "ServerAddress",
    "as_text",
    "building_clients_with",
    "connect",
    "forget_clients",
    "is_redis_url",
    "is_same_server",
    "shown",
]

_SCHEMES = ("redis", "rediss", "sentinel", "unix", "socket", "redis+socket")
_TLS_FILES = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ca_path", "ssl_password")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a Redis is, and how Celery's own connections to it were configured.

    Attributes:
        url: As Celery takes it; several, separated by ``;``, for Sentinel.
        timeout: Seconds for one command.
        options: ``master_name``, ``sentinel_kwargs``, ``ssl`` (Celery's ``broker_use_ssl`` or
            ``redis_backend_use_ssl``) and ``global_keyprefix`` where they were set.
    """

    url: str
    timeout: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key_prefix(self) -> str:
        """kombu's ``global_keyprefix``."""
        return str(self.options.get("global_keyprefix") or "")

    @property
    def identity(self) -> tuple[str, float, str]:
        """What tells two addresses apart."""
        return self.url, self.timeout, repr(sorted(self.options.items()))


@dataclass(frozen=True, slots=True)
class Client:
    """A server's client, with the address to show people and the seconds for one command.

    Attributes:
        redis: For what is done now and then.
        lines: For scripts.
        shown_url: The address.
        timeout: Seconds for one command.
    """

    redis: redis.Redis
    lines: Lines
    shown_url: str
    timeout: float


#: A child's copies of its parent's clients. Were they collected, redis-py would close them.
_inherited: list[Client] = []
_clients: dict[tuple[int, tuple[str, float, str]], Client] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_clients.values())
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def connect(address: ServerAddress) -> Client:
    """Return this process' client for ``address``; no connection is opened before it is used.

    Raises:
        ConfigError: The URL or its options are no good.
    """
    key = (os.getpid(), address.identity)
    client = _clients.get(key)
    if client is None:
        with _lock:
            client = _clients.get(key)
            if client is None:
                built = _builder(address)
                lines = Lines(built.connection_pool)
                client = _clients[key] = Client(built, lines, shown(address.url), address.timeout)
    return client


@contextmanager
def building_clients_with(build: Callable[[ServerAddress], redis.Redis]) -> Iterator[None]:
    """Let another function build the clients of this process: a test's fake server."""
    global _builder
    before, _builder = _builder, build
    forget_clients()
    try:
        yield
    finally:
        _builder = before
        forget_clients()


def forget_clients() -> None:
    """Close this process' clients and forget them."""
    with _lock:
        for client in _clients.values():
            client.lines.close()
            client.redis.close()
        _clients.clear()


def as_text(url: str | Sequence[str] | None) -> str:
    """Return a URL setting as kombu reads it: several URLs, also as a list, are one text."""
    return url if isinstance(url, str) else ";".join(url or ())


def is_redis_url(url: str) -> bool:
    """Say whether Celery would talk to a Redis at ``url``."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in _SCHEMES


def is_same_server(one: str, other: str) -> bool:
    """Say whether two URLs lead to one database, however they are written."""
    return one == other or _place(one) == _place(other)


def _place(url: str) -> Any:
    if ";" in url or not url.startswith(("redis://", "rediss://")):
        return url
    parsed = urlsplit(url)
    return (
        *(parsed.scheme, parsed.username or None, parsed.password),
        *(parsed.hostname, parsed.port or 6379, parsed.path.strip("/") or "0"),
        sorted(parse_qs(parsed.query).items()),
    )


def shown(url: str) -> str:
    """Return ``url`` without passwords, for messages."""
    return ";".join(_without_password(one) for one in url.split(";") if one)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user = credentials.partition(":")[0]
    return f"{scheme}{separator}{user + ':' if user else ':'}**@{host}"


def _build(address: ServerAddress) -> redis.Redis:
    common: dict[str, Any] = {
        "socket_timeout": address.timeout,
        "socket_connect_timeout": min(address.timeout, 2.0),
        "decode_responses": True,
        # redis-py repeats commands by default, also those whose reply was merely late; which of
        # ours may be repeated is decided in scripts.py.
        "retry": Retry(NoBackoff(), 0),
        "socket_keepalive": True,
    }
    scheme = address.url.partition("://")[0]
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{shown(address.url)!r} is not the URL of a Redis: "
            f"its scheme must be one of {', '.join(_SCHEMES)}"
        )
    if scheme == "sentinel":
        return _build_sentinel(address, common)
    tls = _tls_arguments(address.options.get("ssl"))
    if scheme in ("unix", "socket", "redis+socket"):
        return redis.Redis.from_url(_as_unix_url(address.url), **_for_unix(common))
    url = address.url.split(";")[0]
    if scheme == "rediss":
        url, in_url = _take_tls_from(url)
        # Encrypted but unverified is what Celery does when ssl_cert_reqs says so, and only then.
        common |= {"ssl_cert_reqs": "required"} | tls | in_url
    elif tls:
        url = "rediss" + url[len("redis") :]
        common |= tls
    try:
        return redis.Redis.from_url(url, **common)
    except ValueError as error:
        raise ConfigError(f"{shown(url)!r} is not the URL of a Redis: {error}") from error


def _build_sentinel(address: ServerAddress, common: dict[str, Any]) -> redis.Redis:
    parsed = [urlsplit(one) for one in address.url.split(";") if one.strip()]
    master = address.options.get("master_name")
    if not master:
        raise ConfigError(
            f"{shown(address.url)!r} needs the name of its master: set 'master_name' in "
            "broker_transport_options (or result_backend_transport_options)"
        )
    first = parsed[0]
    data = {
        **common,
        "db": _database(first.path),
        **_tls_arguments(address.options.get("ssl")),
    }
    if address.options.get("ssl"):
        data["ssl"] = True
    for one in parsed:
        if one.password is not None:
            data["password"] = unquote(one.password)
            if one.username:
                data["username"] = unquote(one.username)
            break
    sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
        [(one.hostname or "127.0.0.1", one.port or 26379) for one in parsed],
        min_other_sentinels=int(address.options.get("min_other_sentinels") or 0),
        sentinel_kwargs={
            "socket_timeout": address.timeout,
            "socket_connect_timeout": common["socket_connect_timeout"],
            **(address.options.get("sentinel_kwargs") or {}),
        },
        **data,
    )
    master_client: redis.Redis = sentinels.master_for(str(master))
    return master_client


def _database(path: str) -> int:
    name = path.strip("/")
    if not name:
        return 0
    try:
        return int(name)
    except ValueError:
        raise ConfigError(f"{name!r} is not the number of a Redis database") from None


def _as_unix_url(url: str) -> str:
    """Bring ``socket://``, ``redis+socket://`` and ``?virtual_host=`` to what redis-py takes."""
    parsed = urlsplit(url)
    query = parse_qs(parsed.query)
    database = (query.get("db") or query.get("virtual_host") or ["0"])[0]
    credentials = f"{parsed.netloc}" if "@" in parsed.netloc else ""
    return f"unix://{credentials}{parsed.path}?db={_database(database)}"


def _for_unix(common: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in common.items()
        if "keepalive" not in name and "connect" not in name
    }


def _tls_arguments(settings: Any) -> dict[str, Any]:
    if not settings:
        return {}
    if settings is True:
        return {"ssl_cert_reqs": "required"}
    return {name: _certificate_rule(name, value) for name, value in dict(settings).items()}


def _take_tls_from(url: str) -> tuple[str, dict[str, Any]]:
    """Split Celery's TLS parameters (``?ssl_cert_reqs=CERT_REQUIRED``) from a URL."""
    parsed = urlsplit(url)
    found: dict[str, Any] = {}
    kept: list[tuple[str, str]] = []
    for name, values in parse_qs(parsed.query).items():
        if name in ("ssl_cert_reqs", "ssl_check_hostname", *_TLS_FILES):
            found[name] = _certificate_rule(name, values[0])
        else:
            kept.append((name, values[0]))
    return parsed._replace(query=urlencode(kept)).geturl(), found


def _certificate_rule(name: str, value: Any) -> Any:
    if name == "ssl_check_hostname" and isinstance(value, str):
        return value.lower() not in ("false", "0", "no")
    if name != "ssl_cert_reqs":
        return value
    rules = {
        ssl.CERT_NONE: "none",
        ssl.CERT_OPTIONAL: "optional",
        ssl.CERT_REQUIRED: "required",
        None: "none",
    }
    if value in rules:
        return rules[value]
    rule = str(value).lower().removeprefix("cert_")
    if rule not in rules.values():
        raise ConfigError(f"ssl_cert_reqs = {value!r}: give 'none', 'optional' or 'required'")
    return rule


_builder: Callable[[ServerAddress], redis.Redis] = _build
