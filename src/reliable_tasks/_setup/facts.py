"""What there is to know of an app before its settings are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from celery import Celery

from reliable_tasks._dead.options import bounds_of, causes_of
from reliable_tasks._places import has_own_transport, is_amqp_url, read_config, scheme_of
from reliable_tasks._store.client import as_text, is_redis_url
from reliable_tasks._store.letters import Cause
from reliable_tasks.config import ReliableConfig

__all__ = ["Facts"]

Broker = Literal["redis", "amqp", "other"]


@dataclass(frozen=True, slots=True)
class Facts:
    """An app's broker, result backend and what its user set.

    Attributes:
        broker: The kind of broker; Redis by Sentinel or TLS is ``"redis"`` too.
        broker_scheme: The scheme of its URL.
        backend_scheme: The scheme of the result backend's URL, or ``""`` without one.
        transport_options: The user's ``broker_transport_options``.
        config: The user's ``reliable_*`` settings.
    """

    app: Celery
    broker: Broker
    broker_scheme: str
    backend_scheme: str
    transport_options: Mapping[str, Any]
    config: ReliableConfig

    @classmethod
    def of(
        cls,
        app: Celery,
        *,
        transport_options: Mapping[str, Any] | None = None,
    ) -> Facts:
        """Collect the facts; reads the app's configuration."""
        broker = as_text(app.conf.broker_read_url).split(";")[0] or "amqp://"
        backend = as_text(app.conf.result_backend)
        kind: Broker = "other"
        if is_redis_url(broker):
            kind = "redis"
        elif is_amqp_url(broker):
            kind = "amqp"
        return cls(
            app=app,
            broker=kind,
            broker_scheme=scheme_of(broker),
            backend_scheme=scheme_of(backend) if backend not in ("", "disabled") else "",
            transport_options=transport_options or {},
            config=read_config(app),
        )

    @property
    def has_own_transport(self) -> bool:
        """Whether this library's transport talks to the broker."""
        return has_own_transport(self.config, f"{self.broker_scheme}://")

    @property
    def undecodable(self) -> dict[str, Any] | None:
        """How much is kept of messages that nobody can read, if any of it is."""
        causes = causes_of("reliable_dead_letter", self.config.dead_letter)
        return asdict(bounds_of(self.config)) if Cause.UNDECODABLE in causes else None

    @property
    def has_guard_beside(self) -> bool:
        """Whether the broker is RabbitMQ with a Redis at hand that knows which tasks run."""
        redis = self.config.redis_url or as_text(self.app.conf.result_backend)
        return self.broker == "amqp" and is_redis_url(redis)

    @property
    def carries(self) -> bool:
        """Whether running tasks run on when the connection is lost."""
        return self.has_own_transport or self.has_guard_beside

    @property
    def is_stock(self) -> bool:
        """Whether the broker is a Redis that kombu's own transport talks to."""
        return self.broker == "redis" and not self.has_own_transport

    @property
    def has_backend(self) -> bool:
        """Whether results are kept."""
        return bool(self.backend_scheme)

    @property
    def backend_is_remote_redis(self) -> bool:
        """Whether that Redis is reached by TCP."""
        socket = as_text(self.app.conf.result_backend).startswith(("socket:", "redis+socket:"))
        return self.backend_is_redis and not socket

    @property
    def backend_is_redis(self) -> bool:
        """Whether results are kept in a Redis."""
        return is_redis_url(f"{self.backend_scheme}://")
