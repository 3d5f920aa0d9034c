"""Signals of this library, of the kind of Celery's own (``celery.signals``).

Connect a receiver as there::

    @claim_conflict.connect
    def count_duplicates(sender, key, owner, action, **kwargs): ...

The sender is the task. What a receiver raises is logged, and disturbs nobody. Each is sent in the
process where it happens: the caller's, a worker's pool, or a worker's main process.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = ["claim_acquired", "claim_conflict", "claim_lost", "claim_released"]

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
