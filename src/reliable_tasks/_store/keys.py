"""Every Redis key that this library writes.

========================================  ====  =================================================
key                                       type  what
========================================  ====  =================================================
``<prefix>claim:{<claim name>}``          hash  who owns a ``@once`` key; see ``lua/README.md``
``<prefix>ended:{<claim name>}``          str   the last attempt of a task that was retried
``<prefix>replaced:{<claim name>}:<id>``  str   by which task the call of that one was replaced
``<prefix>followed:{<claim name>}:<id>``  str   how a task ended that others follow, or whom it does
``<prefix>leases``                        zset  delivery tag -> when its lease ends (ms)
``<prefix>run:{<task id>}``               hash  which copy of a task may run, and its crashes
``<prefix>sent:<token>``                  str   a message that was queued in the last minutes
``<prefix>bell:<queue>``                  list  wakes one worker that waits for a queue
``<prefix>queues``                        zset  queue's lists -> when a worker last named them
``<prefix>beats``                         zset  worker -> its last sign of life (ms)
``<prefix>keepers``                       hash  worker -> how to tell its connection
``<prefix>sweeper``                       hash  the worker that sweeps, and since when
``<prefix>dead:letter:<id>``              hash  a dead letter, and what became of its replay
``<prefix>dead:all``                      zset  dead letter -> when it was kept (ms)
``<prefix>dead:of:<cause>:<task>``        zset  the same of those of one task and one cause
``<prefix>dead:counts``                   hash  ``<cause>:<task>`` -> how many there are
``<prefix>dead:replayed``                 zset  dead letter that was replayed -> when (ms)
``<prefix>dead:bounds``                   hash  for how long they are kept, and how many
``<prefix>dead:chord:<group id>``         hash  parts of a chord, for its replay
========================================  ====  =================================================

``<prefix>`` is kombu's ``global_keyprefix`` followed by ``reliable_key_prefix``. The braces are
a Redis Cluster hash tag: all that belongs to one claim lives in one slot. Messages themselves
lie under stock kombu's own keys.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BESIDE", "Keys"]

#: What is kept beside another broker has this in its keys; and its tags end so, where those of a
#: Redis broker name the list.
BESIDE = "amqp"


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds keys behind one prefix."""

    prefix: str

    @property
    def beside(self) -> Keys:
        """The keys of what is kept beside another broker.

        Apart from what a Redis broker on the same server keeps, whose sweeper looks for messages.
        """
        return Keys(f"{self.prefix}{BESIDE}:")

    @property
    def claims(self) -> str:
        """What the key of a claim begins with; the name follows in braces."""
        return f"{self.prefix}claim:"

    def claim(self, name: str) -> str:
        """Return the key of the claim called ``name``."""
        return f"{self.claims}{{{name}}}"

    def ended(self, name: str) -> str:
        """Return the key that remembers the last attempt of the claim's last owner."""
        return f"{self.prefix}ended:{{{name}}}"

    @property
    def replacements(self) -> str:
        """What the key begins with of a task whose call was replaced; as `claims`."""
        return f"{self.prefix}replaced:"

    def replaced(self, name: str, task_id: str = "") -> str:
        """Return the key that remembers who has the place of a task whose call was replaced."""
        return f"{self.replacements}{{{name}}}:{task_id}"

    def followed(self, name: str, task_id: str = "") -> str:
        """Return the key that remembers how a task ended that others follow."""
        return f"{self.prefix}followed:{{{name}}}:{task_id}"

    def claims_pattern(self) -> str:
        """Return the ``SCAN`` pattern that finds every claim."""
        escaped = "".join("\\" + c if c in "*?[]\\^" else c for c in self.prefix)
        return f"{escaped}claim:{{*}}"

    @property
    def leases(self) -> str:
        """The key of all leases."""
        return f"{self.prefix}leases"

    @property
    def runs(self) -> str:
        """What the key of a run begins with; the id follows in braces."""
        return f"{self.prefix}run:"

    def run(self, task_id: str) -> str:
        """Return the key of a task's run."""
        return f"{self.runs}{{{task_id}}}"

    def sent(self, token: str) -> str:
        """Return the key that remembers a publish."""
        return f"{self.prefix}sent:{token}"

    def bell(self, queue: str) -> str:
        """Return the key of a queue's bell."""
        return f"{self.prefix}bell:{queue}"

    @property
    def queues(self) -> str:
        """The key of the queues that somebody waits for."""
        return f"{self.prefix}queues"

    @property
    def beats(self) -> str:
        """The key of the workers' signs of life."""
        return f"{self.prefix}beats"

    @property
    def keepers(self) -> str:
        """The key of the keepers' connections."""
        return f"{self.prefix}keepers"

    @property
    def sweeper(self) -> str:
        """The key of the elected sweeper."""
        return f"{self.prefix}sweeper"

    @property
    def dead(self) -> str:
        """What the keys of dead letters begin with."""
        return f"{self.prefix}dead:"

    def dead_letter(self, id_: str) -> str:
        """Return the key of a dead letter."""
        return f"{self.dead}letter:{id_}"

    def dead_of(self, kind: str) -> str:
        """Return the key of the dead letters of ``<cause>:<task>``."""
        return f"{self.dead}of:{kind}"

    def chord(self, group_id: str) -> str:
        """Return the key of what is kept of a chord."""
        return f"{self.dead}chord:{group_id}"
