"""Where an app's claims live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from kombu.exceptions import OperationalError

from reliable_tasks._places import broker_redis, lock_redis, read_config
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.client import is_same_server
from reliable_tasks._store.scripts import Replicas
from reliable_tasks.config import ReliableConfig
from reliable_tasks.errors import StoreUnavailable

__all__ = ["BrokerUnavailable", "Locks", "build_locks", "locks_of"]


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


def build_locks(app: Celery, config: ReliableConfig, kind: type[Claims] = Claims) -> Locks:
    """Return an app's claims, of one kind or another.

    Raises:
        ConfigError: No Redis is configured.
    """
    address = lock_redis(app, config)
    at_broker = broker_redis(app, config)
    # A little less than a command may take, so that the error says what was waited for.
    replicas = Replicas(config.wait_replicas, 0.8 * config.store_timeout)
    # Under another prefix they are other keys than those of the script that queues a message.
    are_at_broker = (
        is_same_server(address.url, at_broker.url) and address.key_prefix == at_broker.key_prefix
    )
    claims = kind(address, config.key_prefix, replicas, is_beside=not are_at_broker)
    return Locks(claims, config, are_at_broker, are_made_by_broker=are_at_broker)
