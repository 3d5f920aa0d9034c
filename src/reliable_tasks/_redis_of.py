"""Which Redis keeps what of an app."""

from __future__ import annotations

from typing import Any

from celery import Celery

from reliable_tasks._celery.settings import reliable_settings
from reliable_tasks._store.client import (
    ServerAddress,
    as_text,
    is_redis_url,
    is_same_server,
    shown,
)
from reliable_tasks.config import REDIS_OPTIONS, ReliableConfig
from reliable_tasks.errors import ConfigError

__all__ = [
    "broker_redis",
    "has_own_transport",
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


def broker_redis(app: Celery, config: ReliableConfig) -> ServerAddress:
    """Return the address of a broker that is a Redis."""
    conf = app.conf
    options = _options(conf.broker_transport_options, conf.broker_use_ssl)
    return ServerAddress(as_text(conf.broker_write_url), config.store_timeout, options)


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


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, without what names a transport behind a plus sign."""
    return url.split("://", 1)[0].split("+", 1)[0] if "://" in url else url.split(":", 1)[0]


def _options(transport_options: Any, use_ssl: Any) -> dict[str, Any]:
    options = dict(transport_options or {})
    found = {name: options[name] for name in REDIS_OPTIONS if options.get(name)}
    if use_ssl:
        found["ssl"] = use_ssl
    return found
