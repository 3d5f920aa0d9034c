"""kombu's Redis transports, with channels that fetch, publish and acknowledge in one step each."""

# Mixed into kombu's classes, of which the type stubs know little.
# mypy: disable-error-code="attr-defined, misc, no-untyped-call, override"

from __future__ import annotations

from typing import Any

import redis
from kombu import transport as transports
from kombu.transport import redis as stock

from reliable_tasks._broker.channel import OPTION, Channel, SentinelChannel
from reliable_tasks._celery.threads import is_patched

__all__ = ["OPTION", "SentinelTransport", "Transport", "install"]


class Transport(stock.Transport):
    """kombu's Redis transport: ours where the app asks for it, else stock."""

    _reliable_channel: Any = Channel
    Channel: Any = stock.Channel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        if client.transport_options.get(OPTION):
            self.Channel = self._reliable_channel
            # With these kombu tries a publish again as often as its policy says, which is safe
            # here; without, a second error in a row is the last.
            self.recoverable_connection_errors = self.connection_errors + self.channel_errors
            self.recoverable_channel_errors = ()

    @property
    def supports_batch_publish(self) -> bool:
        """Whether publishes may be collected; a pipeline of ours could tell no repeated one."""
        return self.Channel is not self._reliable_channel and super().supports_batch_publish

    def drain_events(self, connection: Any, timeout: float | None = None) -> Any:
        """Wait for messages; a socket that was closed meanwhile is a lost connection."""
        try:
            return super().drain_events(connection, timeout=timeout)
        except RuntimeError as error:
            # eventlet's hub, when another green thread lost the connection that this one polls.
            # It is no connection error, and would end the worker.
            if is_patched() == "eventlet" and "simultaneous read" in str(error):
                raise redis.exceptions.ConnectionError(str(error)) from error
            raise


class SentinelTransport(Transport):
    """The same by Sentinel."""

    default_port = stock.SentinelTransport.default_port
    _reliable_channel: Any = SentinelChannel
    Channel: Any = stock.SentinelChannel


def install() -> None:
    """Have kombu use these transports; an app that does not ask for ours keeps stock's.

    kombu goes back to the transport of a URL's scheme when it fails over to the next URL, so
    the schemes themselves must lead here.
    """
    for scheme, name in (
        ("redis", "Transport"),
        ("rediss", "Transport"),
        ("sentinel", "SentinelTransport"),
    ):
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}:{name}"
        transports._transport_cache.pop(scheme, None)
