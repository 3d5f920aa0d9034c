"""The keeper: a thread that says its worker lives, and renews the leases of all it holds."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import redis

from reliable_tasks._broker.fence import note_renewal
from reliable_tasks._broker.held import UNHEARD, Held
from reliable_tasks._broker.mute import UNREACHABLE
from reliable_tasks._broker.saying import finish_telling, say, say_what_waits, speak_later
from reliable_tasks._broker.sweep import BEAT, ring, sweep
from reliable_tasks._celery.threads import native_sleep, start_native_thread
from reliable_tasks._store.scripts import execute

__all__ = ["Keeper"]

logger = logging.getLogger("reliable_tasks")

#: How often the one that sweeps looks for messages that came without a bell (s).
_RING = 0.2
#: How soon a beat is tried again that failed (s).
_AGAIN = 0.2
#: How long the one that sweeps stays in office without a word (s).
_TERM = 2.5
#: How often a worker names the queues that it waits for (s).
_NAME_QUEUES = 20.0
#: How much later than a third of the lease all are back after the server was away (s).
_BACK_WITHIN = 3.0
#: A main loop that does not turn for so long has hung (s), or four leases if that is longer.
_HUNG = 60.0


class Keeper:
    """Renews what one process holds of one broker."""

    def __init__(self, held: Held) -> None:
        self._held = held
        #: Nobody may take the loss of its connection for the worker's death.
        self.goes_by_lease = False
        self._queues: dict[str, Sequence[str]] = {}
        self._starting = threading.Lock()
        self._is_running = False
        self._is_stopped = False
        self._socket: Any = None
        self._server_id = ""
        self._connection = ""
        self._beat_at = 0.0
        self._renewals = 0
        self._named_at = 0.0
        self._is_unreachable = False
        self._reached_at = self._sweeps_from = 0.0
        self._is_fenced = False
        self._has_hung = False

    @classmethod
    def of(cls, held: Held) -> Keeper:
        """Return the keeper of what a process holds."""
        with _lock:
            keeper = _keepers.get(held)
            if keeper is None:
                keeper = _keepers[held] = cls(held)
        return keeper

    def look_after(self, queue: str, lists: Sequence[str]) -> None:
        """Have a queue's messages looked for, whoever sent them; and start."""
        self._queues[queue] = lists
        self._named_at = 0.0
        self.start()

    def start(self) -> None:
        """Start the thread, unless it runs."""
        with self._starting:
            self._is_stopped = False
            if self._is_running:
                return
            self._is_running = True
        start_native_thread(self._run, "reliable-tasks-keeper")

    def stop(self) -> None:
        """Stop, and let others know that this worker ended in good order."""
        self._is_stopped = True
        held = self._held
        try:
            held.say_what_is_unsaid(held.server)
            if not len(held):
                held.fleet.leave(held.server, held.worker)
        except (redis.exceptions.RedisError, OSError) as error:
            if held.unsaid:
                logger.warning(
                    "The broker cannot be told that %d tasks have ended (%s): they run again",
                    held.unsaid,
                    error,
                )
        finish_telling()

    def main_loop_turns(self) -> None:
        """Note that the worker's main loop is alive; from the first call on it is expected."""
        self._held.loop_seen_at = time.monotonic()
        self.say_what_is_unsaid()

    def main_loop_rests(self) -> None:
        """Note that the main loop does not turn while it connects again."""
        self._held.loop_seen_at = None

    def say_what_is_unsaid(self) -> None:
        """Write the log lines that the thread itself must not write."""
        say_what_waits()

    def beat(self) -> bool:
        """Beat once, renew what is due; return whether this worker sweeps.

        Raises:
            redis.ConnectionError: The server cannot be reached.
        """
        held, server = self._held, self._held.keepers
        self._identify(server)
        before, self._beat_at = self._beat_at, time.monotonic()
        if not before or self._beat_at - held.renewed_at >= held.lease / 3 - BEAT / 2:
            # First, for a task may keep this thread waiting after each answer.
            self._renew(server)
        server_now, sweeps, on_hold = held.fleet.beat(
            server,
            worker=held.worker,
            connection=self._connection,
            server_id=self._server_id,
            lease=held.lease,
            elapsed=self._beat_at - before if before else 0.0,
            term=_TERM,
            jump=held.lease / 3,
            gap=max(held.lease / 3, 2 * _TERM),
        )
        if time.monotonic() - held.heard_at > UNHEARD:
            # Silent for so long, it may have been taken for dead before that beat; not after it.
            self._renew(server)
        held.heard_at = self._beat_at
        if held.unsaid:
            held.say_what_is_unsaid(server)
        if self._is_unreachable and self._beat_at - self._reached_at > 2 * BEAT:
            # The others may come back a moment later: first let them renew.
            self._sweeps_from = self._beat_at + min(held.lease, held.lease / 3 + _BACK_WITHIN)
        self._reached_at = self._beat_at
        if sweeps and not on_hold and self._beat_at >= self._sweeps_from:
            sweep(held, server, server_now, self._server_id)
        if self._queues and self._beat_at - self._named_at > _NAME_QUEUES:
            held.fleet.name_queues(server, server_now, self._queues)
            self._named_at = self._beat_at
        return sweeps

    def _run(self) -> None:
        speak_later()
        while not self._is_stopped:
            began = time.monotonic()
            try:
                sweeps = self.beat()
                self._say_reachable()
                wait = BEAT
                while sweeps and wait > 0 and not self._is_stopped:
                    ring(self._held, self._held.keepers)
                    native_sleep(min(_RING, wait))
                    wait = began + BEAT - time.monotonic()
            except UNREACHABLE as error:
                self._say_unreachable(error)
                if isinstance(error, redis.exceptions.ReadOnlyError):
                    # The master became a replica: connect again, to the one that is master now.
                    with suppress(*UNREACHABLE):
                        self._own_connection(self._held.keepers).disconnect()
                wait = _AGAIN
            except redis.exceptions.RedisError as error:
                say(logging.ERROR, "The broker refuses the keeper: %s", error)
                wait = BEAT
            except Exception:  # noqa: BLE001 - whatever it is, the next beat must come
                # Without its keeper a worker would lose all it holds.
                say(logging.ERROR, "The keeper goes on after an error", exc_info=True)
                wait = BEAT
            self._fence()
            native_sleep(max(0.0, min(wait, began + wait - time.monotonic())))
        self._is_running = False
        if not self._is_stopped:  # It was started again after this thread had looked.
            self.start()

    def _renew(self, server: redis.Redis) -> None:
        held = self._held
        if self._main_loop_has_hung():
            return
        # The lease begins for the server when it gets this, which is later.
        sent_at = time.monotonic()
        tags = held.to_renew(sent_at)
        held.note_over(held.messages.renew(server, tags, held.lease, turn=self._renewals))
        self._renewals += 1
        held.renewed_at = sent_at
        note_renewal(sent_at, held.lease)

    def _main_loop_has_hung(self) -> bool:
        seen_at = self._held.loop_seen_at
        if seen_at is None:
            return False
        silent = time.monotonic() - seen_at
        has_hung = silent > max(_HUNG, 4 * self._held.lease)
        if has_hung and not self._has_hung:
            say(
                logging.CRITICAL,
                "The worker's main loop has not turned for %.0f s: its %d messages are left to "
                "other workers",
                silent,
                len(self._held),
            )
        self._has_hung = has_hung
        return has_hung

    def _fence(self) -> None:
        """Say when nothing could be renewed for so long that others may run what we run."""
        silent = time.monotonic() - self._held.renewed_at
        is_fenced = silent > self._held.lease and len(self._held) > 0
        if is_fenced and not self._is_fenced:
            say(
                logging.CRITICAL,
                "No lease could be renewed for %.1f s (reliable_lease is %g s): the %d messages "
                "of this worker may be run by others while it still runs them",
                silent,
                self._held.lease,
                len(self._held),
            )
        self._is_fenced = is_fenced

    def _identify(self, server: redis.Redis) -> None:
        """Find out how the server knows this connection, whenever it is a new one."""
        connection = self._own_connection(server)
        # redis-py connects again by itself; then the server knows it under another number.
        if self._socket is not None and connection._sock is self._socket:  # noqa: SLF001
            return
        self._server_id = self._connection = ""
        execute(server, "PING")
        self._socket = connection._sock  # noqa: SLF001
        try:
            self._server_id = str(execute(server, "INFO", "server")["run_id"])
            known = execute(server, "CLIENT INFO")
            host, port = self._socket.getsockname()[:2]
            # Through a proxy or a translated address, a connection that the server loses says
            # nothing of the worker behind it.
            if known["addr"] not in (f"{host}:{port}", f"[{host}]:{port}"):
                say(
                    logging.INFO,
                    "Dead workers are found by their leases alone: Redis sees this one at %s",
                    known["addr"],
                )
            elif self._held.detects_deaths and not self.goes_by_lease:
                self._connection = f"{self._server_id} {known['id']}"
        except (redis.exceptions.ResponseError, KeyError, TypeError, ValueError) as error:
            say(logging.INFO, "Dead workers are found by their leases alone: %s", error)

    def _own_connection(self, server: redis.Redis) -> Any:
        """Keep one connection: the server takes its loss for the worker's death."""
        if server.connection is None:
            server.connection = server.connection_pool.get_connection()
        # Only this asks the Sentinels; a command alone would dial the master that was.
        connection: Any = server.connection
        connection.connect()
        return connection

    def _say_unreachable(self, error: Exception) -> None:
        if not self._is_unreachable:
            say(logging.WARNING, "The keeper cannot reach the broker: %s", error)
        self._is_unreachable = True

    def _say_reachable(self) -> None:
        if self._is_unreachable:
            say(logging.INFO, "The keeper reaches the broker again")
        self._is_unreachable = False


_keepers: WeakKeyDictionary[Held, Keeper] = WeakKeyDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _keepers.clear()


os.register_at_fork(after_in_child=_after_fork)
