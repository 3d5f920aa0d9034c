"""Where an app's dead letters are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import redis
from celery import Celery

from reliable_tasks._redis_of import broker_redis, has_own_transport, lock_redis, read_config
from reliable_tasks._store.client import ServerAddress, as_text, connect, shown
from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.keys import Keys
from reliable_tasks.errors import ConfigError

__all__ = ["Place", "place_of"]


@dataclass(frozen=True, slots=True)
class Place:
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


_places: WeakKeyDictionary[Celery, tuple[Any, Place | None]] = WeakKeyDictionary()


def place_of(app: Celery) -> Place | None:
    """Return the Redis of an app's dead letters, ``None`` where it has none.

    With this library's transport it is the broker, which ends a delivery and keeps its message in
    one step; else the Redis of the claims.
    """
    known = _places.get(app)
    if known is None or known[0] is not app.conf:
        known = _places[app] = (app.conf, _find(app))
    return known[1]


def _find(app: Celery) -> Place | None:
    config = read_config(app)
    if has_own_transport(config, as_text(app.conf.broker_read_url)):
        address = broker_redis(app, config)
    else:
        try:
            address = lock_redis(app, config)
        except ConfigError:
            return None
    return Place(DeadStore(Keys(address.key_prefix + config.key_prefix)), address)
