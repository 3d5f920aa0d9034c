"""Whether a copy of a task may start here: not while another one of it is alive."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from celery.worker.state import active_requests, requests, reserved_requests, task_ready

from reliable_tasks._celery import stock
from reliable_tasks._celery.budgets import BudgetedRequest
from reliable_tasks._celery.channels import is_lost
from reliable_tasks._celery.consumer import copy_of
from reliable_tasks._celery.registry import hard_limit
from reliable_tasks._celery.setting_aside import SetAside

__all__ = ["GuardedRequest"]

logger = logging.getLogger("reliable_tasks")

#: A copy looks so often at least whether the other one is still alive (s).
_WHILE_HELD_ELSEWHERE = 5.0

#: Where it cannot wait in the worker, it looks more often at first: the other one may be dead.
_MOST_LOOKS = 12
_AT_FIRST = 1.0


class GuardedRequest(BudgetedRequest):
    """A request that asks before it starts: the lease, the guard, or stock kombu's timeout."""

    def _may_start(self) -> bool:
        """Keep a message from starting that the broker may hand to somebody else meanwhile.

        Stock kombu redelivers a message a `visibility_timeout` after it was *fetched*, wherever
        it waited since: behind other tasks, for its ETA, for its rate limit. So where the rest
        of the timeout does not cover the run, it is started anew; once it is used up, the
        message belongs to the copy that the broker has made or is about to make.
        """
        timeout = stock.visibility_timeout(self.message)
        if timeout is not None and not self.acknowledged and not self._may_start_in(timeout):
            return False
        if self._delivery is not None:
            return self._may_start_on_lease()
        return self.acknowledged or self._may_run_again()

    def _may_start_in(self, timeout: float) -> bool:
        limit = hard_limit(self.task, self.time_limits)
        slack = self._guard._reliable_slack(timeout)
        held = time.monotonic() - self.received_at
        if held + limit <= timeout - slack:
            return True
        restarted_at = time.monotonic()
        if held < timeout - slack and stock.restart_timeout(self.message):
            self.received_at = restarted_at
            return True
        task_ready(self)
        logger.warning(
            "Task %s[%s] was held for %.1f s, as long as the broker's visibility_timeout: it is "
            "left to its redelivery",
            self.name,
            self.id,
            held,
        )
        stock.forget(self.message)
        self.acknowledged = True
        return False

    def _may_start_on_lease(self) -> bool:
        """Keep a copy from starting while another one of the same task is alive."""
        delivery = self._delivery
        if not self.task.acks_late or self.acknowledged:
            return True
        if self._is_left_to_broker():
            task_ready(self)
            return False
        is_gone = delivery.is_ended or not self._held.is_open(delivery.tag)
        if self._beside is None and is_gone:
            # Given back by a worker that shuts down.
            task_ready(self)
            self.acknowledged = True
            return False
        if not delivery.copy.may_run or self._held.may_be_over(delivery):
            self._held.hold(delivery)
            self.request_dict["crashes"] = delivery.copy.crashes
        if self._beside is not None and not delivery.copy.may_run:
            self._refuse(delivery.copy)
            return False
        if delivery.copy.has_continued:
            task_ready(self)
            logger.info("Task %s[%s] goes on: its continuation is queued", self.name, self.id)
            self.acknowledge()
            return False
        if delivery.copy.is_over:
            task_ready(self)
            logger.warning(
                "Task %s[%s] is not started here: its lease ended, and others have it",
                self.name,
                self.id,
            )
            self._held.forget(delivery.tag)
            stock.forget(self.message)
            self.acknowledged = True
            return False
        if not delivery.copy.may_run:
            seconds = min(delivery.copy.seconds, _WHILE_HELD_ELSEWHERE)
            self._set_aside(SetAside("another copy of it is alive", 0.05, max(seconds, 0.05)))
            return False
        if delivery.is_redelivered and self._resumes():
            return False
        if not self._may_run_again():
            return False
        if self._has_free_slot:
            self._note_start()
        return True

    def _resumes(self) -> bool:
        """Give the message to a run of it that goes on here: this worker was taken for dead."""
        runner = next((other for other in self._others_here() if other in active_requests), None)
        if runner is None or runner._delivery is None:
            return False
        if not self._held.resume(self._delivery, runner._delivery):
            return False
        task_ready(self)
        logger.info("Task %s[%s] runs here: its message is its own again", self.name, self.id)
        stock.forget(self.message)
        self.acknowledged = True
        requests[self.id] = runner
        return True

    def _refuse(self, copy: Any) -> None:
        """Keep a copy from starting that another broker delivered."""
        runner = next((other for other in self._others_here() if other.is_guarded), None)
        if copy.is_over:
            task_ready(self)
            logger.warning(
                "Task %s[%s] is not run again: another copy of it has ended", self.name, self.id
            )
            self.acknowledge()
        elif copy.is_unknown:
            reason = "the lock Redis does not say whether it runs elsewhere"
            self._set_aside(SetAside(reason, 0.05, copy.seconds))
        elif runner is not None and runner.take_over(self):
            task_ready(self)
            logger.info("Task %s[%s] runs here: its message is its own again", self.name, self.id)
        else:
            longest = _AT_FIRST if self._times_set_aside < _MOST_LOOKS else _WHILE_HELD_ELSEWHERE
            self._set_aside(SetAside("another copy of it is alive", 0.05, longest))
        if runner is not None:
            # Celery knows but one request of an id: that by which a run can be revoked.
            requests[self.id] = runner

    def _others_here(self) -> Iterator[GuardedRequest]:
        """Find the requests of other copies that run or are about to, in this worker."""
        for other in (*copy_of(active_requests), *copy_of(reserved_requests)):
            if other.id == self.id and other is not self and isinstance(other, GuardedRequest):
                yield other

    def take_over(self, copy: GuardedRequest) -> bool:
        """Take the message of a copy for the one that was lost with its connection."""
        if copy._delivery.order != self._delivery.order or not is_lost(self.message.channel):
            return False
        self._message = copy._message
        self._on_ack, self._on_reject = copy._on_ack, copy._on_reject
        self._delivery.is_copy = copy.acknowledged = True
        return True
