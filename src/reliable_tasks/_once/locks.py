"""Where an app's claims live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks._celery.settings import reliable_settings
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.client import (
    ServerAddress,
    as_text,
    is_redis_url,
    is_same_server,
    shown,
)
from reliable_tasks._store.scripts import Replicas
from reliable_tasks.config import REDIS_OPTIONS, ReliableConfig
from reliable_tasks.errors import ConfigError, StoreUnavailable

__all__ = ["BrokerUnavailable", "Locks", "build_locks", "locks_of", "read_config"]


class BrokerUnavailable(StoreUnavailable, OperationalError):
    """The lock Redis is the broker, and it does not answer.

    Callers catch kombu's ``OperationalError`` for a broker that is down; whether the claim or
    the push met it first is no concern of theirs.
    """


@dataclass(frozen=True, slots=True)
class Locks:
    """An app's claims and the settings that go with them.

    Attributes:
        claims: The claims.
        config: The app's settings.
        are_at_broker: Whether they are kept in the broker, which knows the leases of messages.
        are_made_by_broker: Whether the broker makes them in the script that queues a message.
    """

    claims: Claims
    config: ReliableConfig
    are_at_broker: bool
    are_made_by_broker: bool

    def unavailable(self, error: StoreUnavailable) -> StoreUnavailable:
        """Return the error as callers of this app expect it."""
        if self.are_at_broker:
            return BrokerUnavailable(error.url, error.reason)
        return error


#: Read once per configuration, as Celery does with the broker's settings: every publish asks.
_locks: WeakKeyDictionary[Celery, tuple[Any, Locks]] = WeakKeyDictionary()


def locks_of(app: Celery) -> Locks:
    """Return the app's claims.

    Raises:
        ConfigError: No Redis is configured, or a ``reliable_*`` setting is no good.
    """
    known = _locks.get(app)
    if known is None or known[0] is not app.conf:
        known = _locks[app] = (app.conf, build_locks(app, read_config(app)))
    return known[1]


def read_config(app: Celery) -> ReliableConfig:
    """Return the app's ``reliable_*`` settings.

    Raises:
        ConfigError: One is unknown or no good.
    """
    return ReliableConfig.from_mapping(reliable_settings(app))


def build_locks(app: Celery, config: ReliableConfig, kind: type[Claims] = Claims) -> Locks:
    """Return an app's claims, of one kind or another.

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
    address = ServerAddress(url=url, timeout=config.store_timeout, options=options)
    # A little less than a command may take, so that the error says what was waited for.
    replicas = Replicas(config.wait_replicas, 0.8 * config.store_timeout)
    # Under another prefix they are other keys than those of the script that queues a message.
    at_broker_too = address.key_prefix == str(at_broker.get("global_keyprefix") or "")
    are_at_broker = is_same_server(url, broker) and at_broker_too
    claims = kind(address, config.key_prefix, replicas, is_beside=not are_at_broker)
    return Locks(claims, config, are_at_broker, are_made_by_broker=are_at_broker)


def _options(transport_options: Any, use_ssl: Any) -> dict[str, Any]:
    options = dict(transport_options or {})
    found = {name: options[name] for name in REDIS_OPTIONS if options.get(name)}
    if use_ssl:
        found["ssl"] = use_ssl
    return found
