"""Signals of this library, of the kind of Celery's own (``celery.signals``).

Connect a receiver as there::

    @claim_conflict.connect
    def count_duplicates(sender, key, owner, action, **kwargs): ...

The sender is the task. What a receiver raises is logged, and disturbs nobody. Each is sent in the
process where it happens: the caller's, a worker's pool, or a worker's main process.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = [
    "claim_acquired",
    "claim_conflict",
    "claim_lost",
    "claim_released",
    "dead_letter_kept",
    "dead_letter_replayed",
    "dead_letters_dropped",
    "task_crashed",
]

#: A call, or a task whose turn it is, has taken a key. With ``key``, ``task_id`` and
#: ``replaced_id``, the task whose place it has taken, or ``None``.
claim_acquired = Signal(name="claim_acquired", providing_args=["key", "task_id", "replaced_id"])
#: A call, or a task that starts, has found its key taken. With ``key``; ``task_id``, that of the
#: call if it has one, or ``None``; ``owner``, the task that has the key; and ``action``, what is
#: done about it: as ``on_conflict`` names it, or ``"late"`` where a task starts whose claim has
#: lapsed, and that ends as a duplicate.
claim_conflict = Signal(name="claim_conflict", providing_args=["key", "task_id", "owner", "action"])
#: A key is free. With ``key`` and ``task_id``.
claim_released = Signal(name="claim_released", providing_args=["key", "task_id"])
#: A task has ended whose claim had lapsed, or was another one's. With ``key``, ``task_id`` and
#: ``owner``, or ``None``.
claim_lost = Signal(name="claim_lost", providing_args=["key", "task_id", "owner"])
#: A task was started, and ended by no word of its own; its pool child is dead, or its worker. Sent
#: by the worker that lost the child; and where a worker died, by the one that is about to start the
#: task again. With ``task_id``; ``crashes``, how many there were by now, or ``None`` where nobody
#: counts them; ``limit``, how many there may be (``max_crashes``), or ``None``; and ``host``,
#: ``pid``, ``how`` and ``at`` (s since the epoch) of this one, as `PoisonPill.history` has them.
task_crashed = Signal(
    name="task_crashed",
    providing_args=["task_id", "crashes", "limit", "host", "pid", "how", "at"],
)
#: A task will not run again by itself, and is kept. With ``letter``, a `DeadLetter`. The sender is
#: the task, or ``None`` for a message that is no task's.
dead_letter_kept = Signal(name="dead_letter_kept", providing_args=["letter"])
#: A dead letter was replayed. With ``letter``, and ``task_id``, the id of the task that was sent.
dead_letter_replayed = Signal(name="dead_letter_replayed", providing_args=["letter", "task_id"])
#: Dead letters were dropped. With ``count``, and ``reason``: ``"age"`` or ``"count"``.
dead_letters_dropped = Signal(name="dead_letters_dropped", providing_args=["count", "reason"])
