"""Dead letters of an app without any Redis: in a quorum queue, to be worked off in order.

What RabbitMQ dropped by itself is there, too, as it was: it knows no more than why.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from amqp.exceptions import MessageNacked
from celery import Celery
from kombu import Exchange, Producer
from kombu.exceptions import OperationalError

from reliable_tasks._celery.headers import DELIVERY, IN_DOUBT, OF_ONE_COPY, without_brokers_own
from reliable_tasks._celery.queues import DEAD, dead_queue
from reliable_tasks._dead.found import LETTER, Found, read
from reliable_tasks._dead.original import UNREADABLE, Original
from reliable_tasks._dead.replaying import check_from_queue, send_from_queue
from reliable_tasks._places import dead_place, is_amqp_url
from reliable_tasks._store.client import as_text
from reliable_tasks._store.letters import DeadLetter, Letter
from reliable_tasks.errors import ReplayRefused

__all__ = ["IN_ORDER", "Pace", "Queued", "bury_in_queue", "is_in_queue"]

#: What is said where there is no Redis.
IN_ORDER = (
    f"without a Redis dead letters are kept in the queue {DEAD}, which can be read and worked "
    "off in its order alone (list, replay_all, purge)"
)
#: Headers that need not be the same when the same message is delivered again.
_OF_ONE_TIME = (*OF_ONE_COPY, DELIVERY, IN_DOUBT, "crashes", "redelivered")
#: An idle connection may have been cut. More would hold up all that its worker does.
_TRIES = {"max_retries": 1, "interval_start": 0.2}


def bury_in_queue(app: Celery, letter: Letter) -> None:
    """Keep a letter; its message is to be acknowledged afterwards.

    Raises:
        kombu.exceptions.OperationalError: The broker cannot be reached, or refuses it.
    """
    about = {**letter.about.as_dict(), "at": time.time()}
    message = b"" if letter.is_too_large else letter.message
    body = {"about": about, "message": message.decode("utf-8", "surrogateescape")}

    def publish() -> None:
        # Each time the queue is declared, for it can have been deleted since: kombu remembers what
        # it has declared. And the channel is a new one, for an error ends it.
        with connection.channel() as channel:
            queue = dead_queue()(channel)
            queue.declare()
            try:
                Producer(channel).publish(
                    body,
                    serializer="json",
                    exchange=queue.exchange,
                    routing_key=DEAD,
                    headers={LETTER: letter.about.id},
                    delivery_mode=Exchange.PERSISTENT_DELIVERY_MODE,
                    # RabbitMQ confirms also what it has put into no queue.
                    mandatory=True,
                )
            except MessageNacked:
                # For kombu that is a lost connection.
                raise OperationalError(f"queue {DEAD} refuses it: it may be full") from None

    with _connection(app) as connection:
        try:
            # The pool keeps also those that it has closed for an error.
            connection.ensure_connection(**_TRIES)
            connection.ensure(connection, publish, **_TRIES)()
        except (*connection.channel_errors, *connection.connection_errors) as error:
            # What is not mended by another try kombu leaves as the transport's own.
            raise OperationalError(f"queue {DEAD}: {error}") from error


@contextmanager
def _connection(app: Celery) -> Iterator[Any]:
    """Yield a connection to the broker that workers read."""
    if app.conf.broker_read_url == app.conf.broker_write_url:
        with app.connection_or_acquire() as connection:
            yield connection
        return
    # Celery has a pool of connections to the other one alone.
    with app.connection_for_read() as connection:
        yield connection


def is_in_queue(app: Celery) -> bool:
    """Say whether an app's dead letters are in RabbitMQ, for it has no Redis."""
    return is_amqp_url(as_text(app.conf.broker_read_url)) and dead_place(app) is None


class Pace:
    """So many a second, and no more at once after a pause.

    Args:
        rate: How many; ``None`` as many as can be.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate, self._due = rate, time.monotonic()

    def wait(self) -> None:
        """Wait until the next one may go."""
        if self._rate is not None:
            time.sleep(max(self._due - time.monotonic(), 0.0))
            self._due = time.monotonic() + 1.0 / self._rate


class Queued:
    """The dead letters in an app's queue.

    What comes back to it is put behind all others: so whoever looks at a part has to read all.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app

    def count(self) -> int:
        """Count them, those left out that somebody looks at, or did a moment ago."""
        with self._app.connection_for_read() as connection:
            return _count(_declared(connection))

    def walk(self) -> Iterator[DeadLetter]:
        """Yield them in their order, and leave them where they are."""
        with self._taking() as messages:
            for message in messages:
                yield read(message).letter

    def replay(
        self,
        matches: Callable[[DeadLetter], bool],
        tell: Callable[[DeadLetter, str | None, str], None],
        *,
        limit: int | None,
        pace: Pace,
        queue: str | None,
    ) -> None:
        """Replay them in their order, and take those away that were.

        Args:
            matches: Only those for which this is true.
            tell: Called with each, and the new task's id, or ``None`` and why there is none.
            limit: At most so many that are sent.
            pace: How fast.
            queue: The queue to send them to, if it is another one.
        """
        # The same twice is one that was kept, and not acknowledged: its worker died in between.
        sent: set[str] = set()
        with self._asked(matches) as asked:
            for message, found in asked:
                if limit is not None and len(sent) >= limit:
                    break
                letter = found.letter
                try:
                    original = self._check(found)
                    # The same for the same letter, should it not be taken away now.
                    new_id = str(uuid.uuid5(uuid.NAMESPACE_OID, _said_by(found)))
                    if new_id not in sent:
                        pace.wait()
                        send_from_queue(self._app, letter, original, new_id, queue=queue)
                except ReplayRefused as refusal:
                    tell(letter, None, refusal.reason)
                    continue
                sent.add(new_id)
                message.ack()
                tell(letter, new_id, "")

    def check(
        self,
        matches: Callable[[DeadLetter], bool],
        tell: Callable[[DeadLetter, str], None],
        *,
        limit: int | None,
    ) -> None:
        """Say in their order which of them can be replayed; nothing is sent.

        Args:
            matches: As in `replay`.
            tell: Called with each, and why it would be refused or ``""``.
            limit: As in `replay`.
        """
        sent = 0
        with self._asked(matches) as asked:
            for _, found in asked:
                if limit is not None and sent >= limit:
                    break
                reason = ""
                try:
                    self._check(found)
                except ReplayRefused as refusal:
                    reason = refusal.reason
                sent += not reason
                tell(found.letter, reason)

    def purge(
        self, matches: Callable[[DeadLetter], bool], tell: Callable[[DeadLetter], None]
    ) -> int:
        """Remove some for good; return how many."""
        removed = 0
        with self._asked(matches) as asked:
            for message, found in asked:
                message.ack()
                removed += 1
                tell(found.letter)
        return removed

    def _check(self, found: Found) -> Original:
        found.check()
        return check_from_queue(self._app, found.letter, found.raw)

    @contextmanager
    def _asked(
        self, matches: Callable[[DeadLetter], bool]
    ) -> Iterator[Iterator[tuple[Any, Found]]]:
        """Take those that are asked for, with their messages."""
        with self._taking() as messages:
            all_found = ((message, read(message)) for message in messages)
            yield (one for one in all_found if matches(one[1].letter))

    @contextmanager
    def _taking(self) -> Iterator[Iterator[Any]]:
        """Take the messages that are there by now; those that are not acknowledged go back."""
        with self._app.connection_for_read() as connection:
            queue = _declared(connection)
            taken: list[Any] = []

            def messages() -> Iterator[Any]:
                message = _take(queue)
                # The count alone lags by the disk's pace behind what came back to the queue just
                # now; whoever has been given a message since is told of it.
                more = _count(queue)
                while message is not None:
                    taken.append(message)
                    yield message
                    message = _take(queue) if len(taken) <= more else None

            rest = messages()
            try:
                yield rest
            finally:
                if not all(message.acknowledged for message in taken):
                    # All, in their order.
                    deque(rest, maxlen=0)
                for message in taken:
                    if not message.acknowledged:
                        message.requeue()


def _said_by(found: Found) -> str:
    """Return what two letters of one message say, and not those of two calls with one id."""
    try:
        message = json.loads(found.raw)
        headers = without_brokers_own(message["headers"], *_OF_ONE_TIME)
        # RabbitMQ orders the headers of what it delivers again.
        return json.dumps([found.letter.id, {**message, "headers": headers}], sort_keys=True)
    except UNREADABLE:
        # Whoever wrote it was none of ours.
        return repr((found.letter.id, found.raw))


def _declared(connection: Any) -> Any:
    queue: Any = dead_queue()(connection.default_channel)
    queue.declare()
    return queue


def _count(queue: Any) -> int:
    return int(queue.queue_declare(passive=True).message_count)


def _take(queue: Any) -> Any:
    """Take the next message, with what kombu finds wrong with it, which `Queue.get` would raise."""
    found = queue.channel.basic_get(queue=queue.name, no_ack=False)
    return None if found is None else queue.channel.message_to_python(found)
