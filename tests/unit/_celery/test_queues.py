"""A worker does not start on queues that RabbitMQ has as something else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from reliable_tasks import ConfigError
from reliable_tasks._celery import queues
from reliable_tasks._celery.queues import check_queues


class ChannelError(Exception):
    """What a broker answers."""

    def __init__(self, reply_code: int) -> None:
        super().__init__(f"answer {reply_code}")
        self.reply_code = reply_code


class Broker:
    """An app, its connection and its only queue.

    Attributes:
        answer: What a declaration is answered with, if not with success.
        reachable: Whether there is a broker.
        closed: How many channels were closed.
    """

    channel_errors = (ChannelError,)
    name = "celery"

    def __init__(self) -> None:
        self.answer: Exception | None = None
        self.reachable = True
        self.closed = 0
        self.amqp = SimpleNamespace(queues={"celery": self})

    def connection_for_write(self) -> AbstractContextManager[Any]:
        """Connect."""
        return nullcontext(self)

    def ensure_connection(self, **options: Any) -> None:
        """Fail where there is no broker."""
        if not self.reachable:
            raise OperationalError("refused")

    def channel(self) -> Any:
        """Open a channel."""
        return self

    def __call__(self, channel: Any) -> Any:
        """Bind the queue."""
        return self

    def declare(self) -> None:
        """Answer."""
        if self.answer is not None:
            raise self.answer

    def close(self) -> None:
        """Count."""
        self.closed += 1


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A broker that has nothing against anything."""
    made = Broker()
    # The queue of dead letters is as good as any other one.
    monkeypatch.setattr(queues, "dead_queue", lambda: made)
    return made


def test_a_queue_that_fits_is_declared(broker: Any) -> None:
    """And its channel is closed again."""
    check_queues(broker)
    assert broker.closed == 2


def test_a_queue_of_another_type_is_refused(broker: Any) -> None:
    """The message names it and what can be done."""
    broker.answer = ChannelError(406)
    with pytest.raises(ConfigError, match=r"queue 'celery'.*answer 406.*task_default_queue"):
        check_queues(broker)


def test_another_refusal_is_the_brokers_own(broker: Any) -> None:
    """Missing rights are nothing that a new queue would mend."""
    broker.answer = ChannelError(403)
    with pytest.raises(ChannelError):
        check_queues(broker)


def test_a_broker_that_is_not_there_is_waited_for(broker: Any) -> None:
    """By the worker, as always."""
    broker.reachable = False
    check_queues(broker)
