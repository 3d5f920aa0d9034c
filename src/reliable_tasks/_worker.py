"""What a worker runs beside its tasks: the keeper of what it holds."""

from __future__ import annotations

import atexit
import logging
from typing import Any
from weakref import WeakKeyDictionary

from celery import bootsteps
from celery.signals import worker_shutdown, worker_shutting_down
from celery.worker import state
from celery.worker.consumer.tasks import Tasks

from reliable_tasks._broker.beside import beside
from reliable_tasks._broker.fence import take_page
from reliable_tasks._broker.held import all_held
from reliable_tasks._broker.keeper import Keeper
from reliable_tasks._celery.channels import held_by
from reliable_tasks._celery.consumer import CarryingConsumer, is_amqp
from reliable_tasks._celery.delivery import give_back_what_waits, tell_events_to
from reliable_tasks._celery.exits import is_stopping
from reliable_tasks._celery.pools import notice_dead_children, wait_for_all_of_eventlets_pool
from reliable_tasks._celery.signals import handle_signals_in_green_threads
from reliable_tasks._celery.stock import is_stock_redis
from reliable_tasks._dead.rejected import Rejected
from reliable_tasks._once.locks import locks_of
from reliable_tasks._once.waiting import keep_claims
from reliable_tasks.errors import ConfigError

__all__ = ["KeeperStep"]

logger = logging.getLogger("reliable_tasks")

_TICK = 1.0
#: Stock kombu looks each 100 s for what has to come back, if nobody tells it otherwise.
_SWEEP = 110.0

#: The keeper of each worker of this process.
_keepers: WeakKeyDictionary[Any, Keeper] = WeakKeyDictionary()


class KeeperStep(bootsteps.StartStopStep):
    """Ties the keeper to the worker's main loop."""

    requires = (Tasks,)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        # Made before the worker installs its handlers.
        handle_signals_in_green_threads()
        wait_for_all_of_eventlets_pool()
        # Before the pool is.
        take_page()
        self._ticks: list[Any] = []
        self._keeper: Keeper | None = None

    def start(self, parent: Any) -> None:
        """Start the keeper; Celery calls it each time the consumer has connected."""
        notice_dead_children(parent.pool)
        if isinstance(parent, CarryingConsumer):
            parent.rejected = Rejected(parent.app, parent.hostname)
        for tick in self._ticks:
            # A green pool's timer returns the first of the greenlets that follow each other.
            getattr(tick, "entry", tick).cancel()
        self._ticks = [parent.timer.call_repeatedly(_TICK, keep_claims, (parent.app,))]
        held = held_by(parent.task_consumer.channel)
        if held is None:  # One that holds nothing yet is false.
            held = _beside(parent)
        if held is None:
            return
        held.host = parent.hostname
        tell_events_to(parent.app, parent.event_dispatcher)
        keeper = Keeper.of(held)
        # Their fence waits for the end of the lease, so the others must.
        tasks = parent.app.tasks.values()
        keeper.goes_by_lease = any(getattr(task, "exclusive", False) for task in tasks)
        keeper.start()
        # A cold shutdown does not send Celery's signal; and a connection can be a later one.
        atexit.unregister(_leave_all)
        atexit.register(_leave_all)
        _keepers[parent.controller] = keeper
        is_loop_of_its_own = not getattr(parent.pool, "is_green", False) and (
            type(parent.pool).__module__ != "celery.concurrency.solo"
        )
        # In the other pools the loop is the tasks', and may be busy for as long as they are.
        tick = keeper.main_loop_turns if is_loop_of_its_own else keeper.say_what_is_unsaid
        # A loop that never begins to turn has hung, too.
        tick()
        self._ticks.append(parent.timer.call_repeatedly(_TICK, tick))
        self._keeper = keeper

    def stop(self, parent: Any) -> None:
        """Expect no turn of the main loop until the consumer has connected again, if it does.

        A worker that shuts down gives back what has not been started: the tasks that run may
        take their time.
        """
        if self._keeper is not None:
            self._keeper.main_loop_rests()
        if parent.task_consumer is not None and is_stopping(state.should_stop):
            give_back_what_waits(parent.task_consumer.channel)


def _beside(consumer: Any) -> Any:
    """Have a worker of another broker keep its runs in the lock Redis, if there is one."""
    channel = consumer.task_consumer.channel
    is_known = is_amqp(consumer) or is_stock_redis(channel)
    if not is_known or not isinstance(consumer, CarryingConsumer):
        return None
    try:
        locks = locks_of(consumer.app)
    except ConfigError:
        return None
    consumer.beside = beside(locks.claims, locks.config)
    timeout = getattr(channel, "visibility_timeout", 0.0)
    consumer.beside.comes_back_within = timeout + _SWEEP
    return consumer.beside


@worker_shutting_down.connect(weak=False)
def _expect_no_turns(**_: Any) -> None:
    """Take no main loop for hung that waits for the last tasks: Celery does so in the handler."""
    for held in all_held():
        held.loop_seen_at = None


@worker_shutdown.connect(weak=False)
def _leave(sender: Any = None, **_: Any) -> None:
    """Let the others know that a worker has ended in good order."""
    keeper = _keepers.pop(sender, None)
    # Other workers of this process may hold messages of the same broker.
    if keeper is not None and keeper not in _keepers.values():
        keeper.stop()


def _leave_all() -> None:
    _keepers.clear()
    for held in all_held():
        Keeper.of(held).stop()
