"""A broker as the scripts see it, with short names for what tests call often."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import redis
import time_machine

from reliable_tasks._store.dead import DeadStore
from reliable_tasks._store.delivery import UNREADABLE, Copy, Delivery, FetchPlan, Layout
from reliable_tasks._store.fleet import Fleet
from reliable_tasks._store.letters import Bounds, Buried, Cause, DeadLetter, Letter
from reliable_tasks._store.messages import Messages
from reliable_tasks._store.publication import Publication, Published
from tests.conformance.clock import OnAClock

#: What kombu puts between a queue's name and a priority.
SEP = "\x06\x16"
#: How many dead letters are kept, how old ones, and how large ones.
BOUNDS = Bounds(max_age=3600.0, max_count=100, max_body=10_000)
#: The steps of priority that these tests use.
STEPS = (0, 3)


def message(task_id: str | None = "one", queue: str = "celery", **headers: Any) -> str:
    """A message as kombu writes it."""
    if task_id is not None:
        headers = {"id": task_id, "task": "shop.send_invoice", **headers}
    return json.dumps(
        {
            "body": "W1s3XSwge30sIHt9XQ==",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {
                "delivery_mode": 2,
                "delivery_tag": str(uuid4()),
                "delivery_info": {"exchange": "", "routing_key": queue},
                "body_encoding": "base64",
            },
        }
    )


def letter(
    task_id: str = "one",
    *,
    raw: bytes = b'{"headers": {}}',
    task: str = "shop.send_invoice",
    cause: Cause = Cause.FAILED,
    bounds: Bounds = BOUNDS,
    **about: Any,
) -> Letter:
    """A dead letter that is to be kept."""
    known = {"id": task_id, "task_id": task_id, "error": "ValueError: it is broken", **about}
    return Letter(DeadLetter(task=task, cause=cause, **known), raw, bounds)


class Broker(OnAClock):
    """The messages of one server.

    Args:
        server: A client that leaves answers as they are, as kombu's does.
        traveller: The clock of a fake server; a real one has its own.
        prefix: kombu's ``global_keyprefix``.
    """

    def __init__(
        self,
        server: redis.Redis,
        traveller: time_machine.Traveller | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(traveller)
        self.server = server
        self.prefix = prefix
        layout = Layout(prefix, "unacked", "unacked_index", SEP)
        self.messages = Messages(layout, "reliable:", bounds=BOUNDS)
        self.keys = self.messages.keys
        self.fleet = Fleet(layout, self.keys)
        self._fetches = 0

    # -- what a process does -------------------------------------------------------------------

    def publish(
        self,
        task_id: str | None = "one",
        queue: str = "celery",
        *,
        priority: int = 0,
        token: str | None = None,
        publication: Publication | None = None,
        expires: tuple[int, Sequence[str]] | None = None,
        raw: str | None = None,
    ) -> Published:
        """Queue a message."""
        call = self.messages.prepare_publish(
            token=token or uuid4().hex,
            list_=list_of(queue, priority),
            queue=queue,
            message=message(task_id, queue) if raw is None else raw,
            publication=publication,
            expires=expires,
        )
        return self.messages.publish(self.server, call)

    def plan(
        self,
        worker: str = "w1",
        queues: Sequence[str] = ("celery",),
        *,
        count: int = 10,
        lease: float = 30.0,
        rotates: bool = False,
        unleased: Iterable[str] = (),
    ) -> FetchPlan:
        """Prepare a fetch whose tags are new."""
        self._fetches += 1
        return self.messages.plan_fetch(
            f"{worker}:{self._fetches}:",
            queues=queues,
            lists=[list_of(queue, step) for step in STEPS for queue in queues],
            unleased=unleased,
            count=count,
            rotates=rotates,
            lease=lease,
        )

    def run(self, plan: FetchPlan) -> list[Delivery]:
        """Carry a fetch out, and read its answer as the transport does."""
        deliveries = []
        for tag, list_, queue, raw, copy in plan.read(plan.run(self.server)):
            delivery = Delivery(tag, list_, queue, raw, copy)
            with suppress(*UNREADABLE):
                delivery.describe(json.loads(raw))
            deliveries.append(delivery)
        return deliveries

    def fetch(self, worker: str = "w1", **options: Any) -> list[Delivery]:
        """Take messages."""
        return self.run(self.plan(worker, **options))

    def fetch_one(self, worker: str = "w1", **options: Any) -> Delivery:
        """Take the one message that there is."""
        (delivery,) = self.fetch(worker, **options)
        return delivery

    def start(self, delivery: Delivery) -> None:
        """Count a start as the process does."""
        self.server.execute_command(*self.messages.runs.count_start(delivery, 1))
        delivery.is_started = True

    def end_lease(self, delivery: Delivery) -> None:
        """Have a lease end now, by the server's clock."""
        self.server.zadd(self.keys.leases, {delivery.tag: self.now() * 1000 - 1}, xx=True)

    def hold(self, delivery: Delivery) -> Copy:
        """Ask the guard again."""
        return self.messages.hold(self.server, delivery, 30.0)

    def bury(self, worker: str) -> int:
        """End the leases of a worker of which nothing was heard for long."""
        self.server.zadd(self.keys.beats, {worker: self.now() * 1000 - 10_000})
        ended = self.fleet.end_leases_of(self.server, worker, silent=2.0)
        assert ended is not None
        return ended

    def die(self, delivery: Delivery, kept: Letter | None = None) -> Buried:
        """Acknowledge, and keep the message as a dead letter."""
        delivery.letter = kept or letter(delivery.task_id, raw=delivery.raw)
        return self.messages.bury(self.server, delivery)

    def keep(self, kept: Letter, event: str | None = None) -> tuple[str, int]:
        """Keep a dead letter whose message is acknowledged already."""
        return self.dead_store.bury(self.server, kept, event or uuid4().hex)

    def settle(self, delivery: Delivery) -> bool:
        """Acknowledge."""
        return self.messages.settle(self.server, delivery)

    def requeue(
        self, delivery: Delivery, *, to_back: bool = False, if_lapsed: bool = False
    ) -> bool:
        """Put back, as its worker does or as the sweeper does."""
        if if_lapsed:
            return bool(self.messages.requeue_lapsed(self.server, [delivery], 600.0, list))
        return self.messages.requeue(self.server, delivery, to_back=to_back)

    def sweep(self) -> int:
        """Put back what has lapsed, as the sweeper does."""
        tags = self.fleet.lapsed(self.server, self.now(), limit=100)
        count = 0
        for found in self.messages.find(self.server, tags):
            if isinstance(found, str):
                self.messages.drop(self.server, found)
            else:
                count += self.requeue(found, if_lapsed=True)
        return count

    # -- what is there -------------------------------------------------------------------------

    def waiting(self, queue: str = "celery", priority: int = 0) -> list[Any]:
        """The messages of a list, the next one first."""
        key = self.prefix + list_of(queue, priority)
        return [json.loads(raw) for raw in reversed(self.server.lrange(key, 0, -1))]

    def waiting_ids(self, queue: str = "celery", priority: int = 0) -> list[str]:
        """The ids of their tasks."""
        return [found["headers"]["id"] for found in self.waiting(queue, priority)]

    @property
    def unacked(self) -> dict[str, Any]:
        """What was delivered, by its tag."""
        found = self.server.hgetall(self.prefix + "unacked")
        return {tag.decode(): json.loads(entry) for tag, entry in found.items()}

    @property
    def index(self) -> dict[str, float]:
        """When stock workers would put a delivery back (s)."""
        found = self.server.zrange(self.prefix + "unacked_index", 0, -1, withscores=True)
        return {tag.decode(): score for tag, score in found}

    @property
    def dead_store(self) -> DeadStore:
        """What reads and writes dead letters."""
        return self.messages.dead

    def walk(self, **which: Any) -> Iterator[DeadLetter]:
        """Walk over dead letters: all of them, or those that are asked for."""
        every: dict[str, Any] = {"task": None, "cause": None, "since": None}
        return self.dead_store.walk(self.server, **{**every, **which})

    def count_dead(self, **which: Any) -> int:
        """Count the dead letters that were not replayed."""
        return self.dead_store.count(
            self.server, **{"task": None, "cause": None, "since": None, **which}
        )

    @property
    def dead(self) -> list[DeadLetter]:
        """The dead letters, the newest first."""
        return list(self.walk())

    def indexed_dead(self) -> tuple[dict[str, float], dict[str, float]]:
        """Check that letters, indexes and counts say the same.

        Returns:
            Those that were not replayed, and those that were, each with its time (s).
        """
        names = [key.decode() for key in self.server.scan_iter(self.keys.dead + "*")]
        start = self.keys.dead_letter("")
        waiting: dict[str, float] = {}
        replayed: dict[str, float] = {}
        kinds: dict[str, dict[str, float]] = {}
        for id_ in (name.removeprefix(start) for name in names if name.startswith(start)):
            key = self.keys.dead_letter(id_)
            kind, at, sent = self.server.hmget(key, "kind", "at", "replayed")
            assert None not in (kind, at), f"letter {id_} is no whole one"
            if sent is None:
                waiting[id_] = kinds.setdefault(kind.decode(), {})[id_] = float(at)
            else:
                replayed[id_] = float(sent)

        def index(name: str) -> dict[str, float]:
            rows = self.server.zrange(f"{self.keys.dead}{name}", 0, -1, withscores=True)
            return {id_.decode(): score for id_, score in rows}

        assert index("all") == waiting
        assert index("replayed") == replayed
        of = self.keys.dead_of("")
        found = {name.removeprefix(of) for name in names if name.startswith(of)}
        assert {kind: index(f"of:{kind}") for kind in found} == kinds
        counts = self.server.hgetall(f"{self.keys.dead}counts")
        assert {kind.decode(): int(count) for kind, count in counts.items()} == {
            kind: len(ids) for kind, ids in kinds.items()
        }
        return (
            {id_: at / 1000 for id_, at in waiting.items()},
            {id_: at / 1000 for id_, at in replayed.items()},
        )

    def dead_message(self, letter: DeadLetter) -> bytes:
        """What is kept of the message of a dead letter."""
        return self.messages.dead.message(self.server, letter.id)

    @property
    def leases(self) -> dict[str, float]:
        """When a lease ends (s)."""
        found = self.server.zrange(self.keys.leases, 0, -1, withscores=True)
        return {tag.decode(): score / 1000 for tag, score in found}

    def run_of(self, task_id: str = "one") -> dict[str, str]:
        """The run of a task."""
        found = self.server.hgetall(self.keys.run(task_id))
        return {name.decode(): value.decode() for name, value in found.items()}

    def tokens(self, queue: str = "celery") -> int:
        """How many workers a queue's bell would wake."""
        return int(self.server.llen(self.keys.bell(queue)))

    def silence(self, queue: str = "celery") -> None:
        """Take what a bell holds."""
        self.server.delete(self.keys.bell(queue))


def list_of(queue: str, priority: int = 0) -> str:
    """The list of a queue's priority."""
    return f"{queue}{SEP}{priority}" if priority else queue


def task_ids(deliveries: Iterable[Delivery]) -> list[str]:
    """The ids of the tasks that were taken, in that order."""
    return [delivery.task_id for delivery in deliveries]
