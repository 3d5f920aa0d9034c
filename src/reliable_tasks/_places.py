"""Which Redis keeps what of an app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import redis
from celery import Celery

from reliable_tasks._celery.settings import reliable_settings
from reliable_tasks._store.client import (
    ServerAddress,
    as_text,
    connect,
    is_redis_url,
    is_same_server,
    shown,
)
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.keys import Keys
from reliable_tasks.config import REDIS_OPTIONS, ReliableConfig
from reliable_tasks.errors import ConfigError

__all__ = [
    "DeadPlace",
    "broker_redis",
    "dead_place",
    "has_own_transport",
    "is_amqp_url",
    "lock_redis",
    "read_config",
    "scheme_of",
]

#: The schemes that kombu's own transports have, and ours takes over.
_OWN_SCHEMES = ("redis", "rediss", "sentinel")


def read_config(app: Celery) -> ReliableConfig:
    """Return the app's ``reliable_*`` settings.

    Raises:
        ConfigError: One is unknown or no good.
    """
    return ReliableConfig.from_mapping(reliable_settings(app))


def has_own_transport(config: ReliableConfig, broker_url: str) -> bool:
    """Say whether this library's transport talks to the broker at a URL."""
    return config.broker == "reliable" and scheme_of(broker_url) in _OWN_SCHEMES


def is_amqp_url(url: str) -> bool:
    """Say whether a broker's URL is RabbitMQ's."""
    return scheme_of(url) in ("amqp", "amqps", "pyamqp", "pyamqps", "librabbitmq")


def broker_redis(
    app: Celery, config: ReliableConfig, *, is_for_reading: bool = False
) -> ServerAddress:
    """Return the address of a broker that is a Redis: where tasks are sent, or where workers read.

    They are two where the one is ``broker_write_url`` and the other ``broker_read_url``.
    """
    conf = app.conf
    url = conf.broker_read_url if is_for_reading else conf.broker_write_url
    options = _options(conf.broker_transport_options, conf.broker_use_ssl)
    return ServerAddress(as_text(url), config.store_timeout, options)


def lock_redis(app: Celery, config: ReliableConfig) -> ServerAddress:
    """Return the address of the Redis of an app's claims.

    Raises:
        ConfigError: No Redis is configured.
    """
    conf = app.conf
    broker, backend = as_text(conf.broker_write_url), as_text(conf.result_backend)
    at_broker = _options(conf.broker_transport_options, conf.broker_use_ssl)
    at_backend = _options(conf.result_backend_transport_options, conf.redis_backend_use_ssl)
    url = config.redis_url
    if url:
        options = dict(config.redis_options or {})
        if not options and is_same_server(url, broker):
            options = at_broker
        elif not options and is_same_server(url, backend):
            options = at_backend
    elif is_redis_url(broker):
        url, options = broker, at_broker
    elif is_redis_url(backend):
        url, options = backend, at_backend
    else:
        raise ConfigError(
            "@once needs a Redis for its claims, and neither the broker "
            f"({shown(broker)}) nor the result backend ({shown(backend) or 'none'}) is one: "
            "set reliable_redis_url"
        )
    return ServerAddress(url=url, timeout=config.store_timeout, options=options)


@dataclass(frozen=True, slots=True)
class DeadPlace:
    """A Redis with dead letters.

    Attributes:
        store: They.
        address: Where it is.
    """

    store: DeadStore
    address: ServerAddress

    @property
    def server(self) -> redis.Redis:
        """This process' client."""
        return connect(self.address).redis

    @property
    def shown_url(self) -> str:
        """The address without its password."""
        return shown(self.address.url)


#: Found once per configuration, as Celery reads the broker's settings.
_dead_places: WeakKeyDictionary[Celery, tuple[Any, DeadPlace | None]] = WeakKeyDictionary()


def dead_place(app: Celery) -> DeadPlace | None:
    """Return the Redis of an app's dead letters, ``None`` where it has none.

    With this library's transport it is the broker that workers read, which ends a delivery and
    keeps its message in one step; else the Redis of the claims.
    """
    known = _dead_places.get(app)
    if known is None or known[0] is not app.conf:
        known = _dead_places[app] = (app.conf, _find_dead_place(app))
    return known[1]


def _find_dead_place(app: Celery) -> DeadPlace | None:
    config = read_config(app)
    if has_own_transport(config, as_text(app.conf.broker_read_url)):
        address = broker_redis(app, config, is_for_reading=True)
    else:
        try:
            address = lock_redis(app, config)
        except ConfigError:
            return None
    return DeadPlace(DeadStore(Keys(address.key_prefix + config.key_prefix)), address)


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, without what names a transport behind a plus sign."""
    return url.split("://", 1)[0].split("+", 1)[0] if "://" in url else url.split(":", 1)[0]


def _options(transport_options: Any, use_ssl: Any) -> dict[str, Any]:
    options = dict(transport_options or {})
    found = {name: options[name] for name in REDIS_OPTIONS if options.get(name)}
    if use_ssl:
        found["ssl"] = use_ssl
    return found
