"""How often a task may crash or go back to its queue, and beside whom one runs that has crashed.

A crash that takes a whole worker with it is counted for all that ran there: one of them is to
blame, and the others are not to be lost with it again. So all of them are suspects. A worker starts
one of them at a time, and the next one when that has ended, or has run for 3 s; on its last
start a suspect runs beside no other one at all. A crash of a child alone is nobody else's.
"""

from __future__ import annotations

import math
import time
from typing import Any

from celery.worker.state import active_requests, reserved_requests, task_ready

from reliable_tasks._celery.consumer import copy_of
from reliable_tasks._celery.counts import counted
from reliable_tasks._celery.failures import info_of
from reliable_tasks._celery.headers import CONDEMNED
from reliable_tasks._celery.setting_aside import PatientRequest, SetAside
from reliable_tasks.errors import PoisonPill, ReliableError, RequeuesExhausted

__all__ = ["BudgetedRequest", "condemned"]

#: For how long a suspect is started alone (s): what kills mostly does so soon.
_PROBATION = 3.0
#: How soon one that waits for its turn looks again, at first and at last (s).
_TURN = (0.05, 1.0)
_MOST_LOOKS = 60
#: How soon it is asked again what nobody could say (s).
_UNKNOWN = (0.05, 5.0)
_OTHERS_TURN = "it was lost with its worker, and so was another task that runs here"
_ERRORS: dict[str, type[ReliableError]] = {
    error.__name__: error for error in (PoisonPill, RequeuesExhausted)
}


def condemned(request: Any) -> ReliableError | None:
    """Return what a task ends with that is not to run again, in the child that says so."""
    found = request.get(CONDEMNED)
    return _ERRORS[found[0]](*found[1]) if found else None


class BudgetedRequest(PatientRequest):
    """A request that runs no more often than its task may crash."""

    #: Until when no other suspect is started beside this one (monotonic s); 0 if it is none.
    _alone_until = 0.0
    _is_last_start = False
    _has_told_crash = False

    @property
    def _crashes(self) -> int:
        """How often the task was started before and ended by no word of its own."""
        if self._delivery is not None:
            return int(self._delivery.copy.crashes)
        # Of RabbitMQ without a Redis.
        return counted(self.request_dict) if self.task.acks_late and self._is_amqp else 0

    def _may_run_again(self) -> bool:
        """Say whether the task may be started; if not, it was set aside, or has ended."""
        # Of a start before: what is decided now counts.
        self.request_dict.pop(CONDEMNED, None)
        crashes, requeues = self._crashes, self._times_requeued
        if not crashes and not requeues:
            return True
        history = self._history() if crashes else []
        if history is None:
            self._set_aside(SetAside("nobody says how it crashed", *_UNKNOWN))
            return False
        verdict = self._verdict(crashes, requeues, history)
        if isinstance(verdict, PoisonPill) and self._have_handlers_crashed(verdict, history):
            self._tell_crash(crashes, history)
            self.on_failure(info_of(verdict))
            return False
        if crashes and not self._has_its_turn(crashes, history):
            self._wait_for_turn()
            return False
        self._tell_crash(crashes, history)
        if verdict is not None:
            self._condemn(verdict)
        return True

    def _verdict(self, crashes: int, requeues: int, history: list[Any]) -> ReliableError | None:
        """Return what it ends with if it may not run again."""
        max_crashes, max_requeues = self._guard._reliable_budgets()
        if crashes and max_crashes is not None and crashes >= max_crashes:
            known = [crash.as_dict() for crash in history]
            return PoisonPill(self.id, crashes, max_crashes, known)
        if max_requeues is not None and requeues > max_requeues:
            return RequeuesExhausted(self.id, requeues, max_requeues)
        return None

    def _have_handlers_crashed(self, verdict: PoisonPill, history: list[Any]) -> bool:
        """Say whether a child that was only to say so has crashed, too."""
        if history:
            return bool(history[-1].is_ending)
        return verdict.crashes > verdict.limit

    def _condemn(self, verdict: ReliableError) -> None:
        """Start a child only to say that the task is over."""
        self.request_dict[CONDEMNED] = (type(verdict).__name__, verdict.args)
        if self._delivery is not None:
            self._held.name_starter(self._delivery, is_ending=True)
            # Where the start is counted already; else it will be with this.
            self._held.explain_start(self._delivery)

    def _has_its_turn(self, crashes: int, history: list[Any]) -> bool:
        """Say whether a suspect may start, or it is none."""
        if history and all(crash.how for crash in history):
            return True
        max_crashes, _ = self._guard._reliable_budgets()
        is_last = crashes > 1 or (max_crashes is not None and crashes + 1 >= max_crashes)
        if self._is_beside_a_suspect(of_any_age=is_last):
            return False
        self._alone_until, self._is_last_start = math.inf, is_last
        return True

    def on_accepted(self, pid: Any, time_accepted: float) -> None:
        """Let another suspect start a while after this one has; it may have waited in the pool."""
        if self._alone_until and not self._is_last_start:
            self._alone_until = time.monotonic() + _PROBATION
        super().on_accepted(pid, time_accepted)

    def _wait_for_turn(self) -> None:
        """Look again in a moment, and if that has been no use, have another worker look."""
        if self._times_set_aside >= _MOST_LOOKS and self._lay_aside():
            task_ready(self)
            return
        self._set_aside(SetAside(_OTHERS_TURN, *_TURN, waits_for=_OTHERS_TURN))

    def _is_beside_a_suspect(self, *, of_any_age: bool) -> bool:
        since = 0.0 if of_any_age else time.monotonic()
        running = (*copy_of(active_requests), *copy_of(reserved_requests))
        return any(getattr(one, "_alone_until", 0.0) > since for one in running if one is not self)

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._alone_until, self._is_last_start = 0.0, False

    def _history(self) -> list[Any] | None:
        """Return what is known of the crashes, ``None`` if nobody says it now."""
        return [] if self._delivery is None else self._held.crashes(self._delivery)

    def _tell_crash(self, crashes: int, history: list[Any]) -> None:
        """Tell of the last crash, unless the worker did that lost its child by it."""
        if self._has_told_crash or not history or history[-1].how:
            return
        self._has_told_crash = True
        self._guard._reliable_crashed(self.id, crashes, history[-1].as_dict())

    def _note_crash(self, how: str) -> None:
        """Note, and tell, that the child of this run is dead."""
        how = how or "lost"
        if self._delivery is not None:
            self._delivery.has_crashed = True
            self._held.name_starter(self._delivery, pid=self.worker_pid, how=how)
        at = self.time_start or time.time()
        crash = {"host": self.hostname, "pid": self.worker_pid, "how": how, "at": at}
        is_counted = self._delivery is not None or self._is_amqp
        self._guard._reliable_crashed(self.id, self._crashes + 1 if is_counted else None, crash)
