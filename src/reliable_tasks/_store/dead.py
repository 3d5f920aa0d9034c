"""The dead letters behind one prefix: kept, found, counted, replayed and dropped."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from itertools import islice
from typing import Any
from uuid import uuid4

import redis

from reliable_tasks._store.keys import Keys
from reliable_tasks._store.letters import DeadLetter, Letter, as_message, read_letter
from reliable_tasks._store.scripts import Argument, checked, execute, load, pipelined
from reliable_tasks._store.values import ms, pairs, text

__all__ = ["DeadStore", "Pruned", "Reservation", "Sent"]

#: How many are read in one go, and how many dropped.
_AT_ONCE = 200
#: For how long one caller replays a dead letter undisturbed (s).
_WINDOW = 15.0
#: Fields of what is kept of a chord: how many parts it has, and whether one of them has died.
_SIZE, _HAS_DEAD, _SENDING = "#", "@", "!"


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was dropped.

    Attributes:
        aged: How many for their age, but for those that were replayed.
        many: How many because there were too many, the same.
        soon: How many are in the last tenth of their time.
        count: How many there are.
        max_count: How many there may be.
    """

    aged: int
    many: int
    soon: int
    count: int
    max_count: int


class Reservation(IntEnum):
    """Answers to who wants to replay; the numbers are those of ``dead_reserve.lua``."""

    NOT_FOUND = 0
    OURS = 1
    IN_DOUBT = 2
    SENT = 3
    OTHERS = 4


class Sent(StrEnum):
    """How a replay went, as ``dead_release.lua`` has it."""

    SENT = "sent"
    IN_DOUBT = "doubt"
    REFUSED = "refused"


#: The least score and the greatest, as Redis reads them.
_Edges = tuple[str | float, str]


@dataclass(frozen=True, slots=True)
class _Index:
    """How an index is read: between which scores, in which order, and how much at once."""

    least: str | float
    most: str
    oldest_first: bool
    page: int

    def rows(self, key: str, edge: float | None = None, known: int = 0) -> tuple[Any, ...]:
        """Return the command that reads on from a score, of which so many are known."""
        between: tuple[Any, ...]
        if self.oldest_first:
            between = ("ZRANGEBYSCORE", key, self.least if edge is None else edge, self.most)
        else:
            between = ("ZREVRANGEBYSCORE", key, self.most if edge is None else edge, self.least)
        return (*between, "WITHSCORES", "LIMIT", 0, self.page + known)


class DeadStore:
    """The dead letters behind one prefix.

    Every method takes the client to use, raises redis-py's own errors, and can be repeated when
    its reply was lost.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    # -- writing -------------------------------------------------------------------------------

    def bury(self, server: redis.Redis, letter: Letter, event: str) -> tuple[str, int]:
        """Keep a letter whose message is acknowledged; return its id and how many there are."""
        answer = load("dead_bury").on(server, [self.keys.dead], letter.arguments(event))
        return text(answer[0]), int(answer[1])

    def note_chord(self, server: redis.Redis, group_id: str, size: int, ttl: float) -> None:
        """Note how many parts a chord has, for so long (s)."""
        self.keep_part(server, group_id, _SIZE, str(size).encode(), ttl)

    def keep_part(
        self, server: redis.Redis, group_id: str, task_id: str, message: bytes, ttl: float
    ) -> None:
        """Keep the message of a part of a chord that has succeeded, for so long (s)."""
        args: list[Argument] = [task_id, message, ms(ttl)]
        load("chord_keep").on(server, [self.keys.chord(group_id)], args)

    def prune(self, server: redis.Redis) -> Pruned:
        """Drop what is too old, or too many; some of it."""
        return Pruned(*map(int, load("dead_prune").on(server, [self.keys.dead], [_AT_ONCE])))

    def discard(self, server: redis.Redis, id_: str) -> bool:
        """Remove a letter; return whether there was one."""
        keys = [self.keys.dead, self.keys.dead_letter(id_)]
        return bool(load("dead_discard").on(server, keys, [id_]))

    def discard_each(self, server: redis.Redis, ids: Sequence[str]) -> int:
        """Remove some letters; return how many there were."""
        calls = [([self.keys.dead, self.keys.dead_letter(id_)], [id_]) for id_ in ids]
        return sum(map(int, load("dead_discard").on_each(server, calls))) if calls else 0

    # -- replaying -----------------------------------------------------------------------------

    def reserve(self, server: redis.Redis, id_: str, token: str) -> tuple[Reservation, str]:
        """Ask to replay a letter; return whether one may, and the id of the new task."""
        args: list[Argument] = [str(uuid4()), token, ms(_WINDOW)]
        code, new_id = load("dead_reserve").on(server, [self.keys.dead_letter(id_)], args)
        return Reservation(int(code)), text(new_id)

    def release(
        self, server: redis.Redis, id_: str, token: str, how: Sent, new_id: str = ""
    ) -> None:
        """Note how a replay went, whose new id is known where it was sent."""
        keys = [self.keys.dead, self.keys.dead_letter(id_)]
        load("dead_release").on(server, keys, [id_, token, how, new_id])

    def parts(self, server: redis.Redis, group_id: str) -> tuple[int, dict[str, bytes]]:
        """Return what is kept of a chord.

        Returns:
            How many parts it has, 0 if nobody knows; and of those that have ended the task ids, and
            their messages or, of one that died, ``@`` and its letter's id.
        """
        found = execute(server, "HGETALL", self.keys.chord(group_id))
        kept = {text(name): as_message(value) for name, value in found.items()}
        size = int(kept.pop(_SIZE, b"0"))
        for mark in (_HAS_DEAD, _SENDING):
            kept.pop(mark, None)
        return size, kept

    def begin_chord(self, server: redis.Redis, group_id: str, token: str, last_id: str) -> bool:
        """Note that a chord is about to be sent anew, and the id of what is sent last.

        Returns:
            Whether nobody had begun before; ``False`` also where nothing is kept of it any more.
        """
        args: list[Argument] = [token, last_id]
        return bool(load("chord_begin").on(server, [self.keys.chord(group_id)], args))

    def begun(self, server: redis.Redis, group_id: str) -> str:
        """Return the id of what is sent last by who has begun to send a chord, or ``""``."""
        return self._begun(server, group_id)[1]

    def _begun(self, server: redis.Redis, group_id: str) -> tuple[str, str]:
        """Return the token of who has begun, too."""
        mark = text(execute(server, "HGET", self.keys.chord(group_id), _SENDING) or b"")
        token, _, last_id = mark.partition(" ")
        return token, last_id

    def give_up_chord(self, server: redis.Redis, group_id: str, token: str) -> None:
        """Note that who has begun so has sent nothing of a chord, after all."""
        # Nobody else can have begun meanwhile.
        if self._begun(server, group_id)[0] == token:
            execute(server, "HDEL", self.keys.chord(group_id), _SENDING)

    def forget_parts(self, server: redis.Redis, group_id: str) -> None:
        """Forget a chord that was replayed."""
        execute(server, "DEL", self.keys.chord(group_id))

    # -- reading -------------------------------------------------------------------------------

    def now(self, server: redis.Redis) -> float:
        """Return the time that letters are kept by (s since the epoch)."""
        seconds, micros = execute(server, "TIME")
        return int(seconds) + int(micros) / 1_000_000

    def get(self, server: redis.Redis, id_: str) -> DeadLetter | None:
        """Return a letter with its traceback."""
        found = self._read(server, [id_])
        if not found:
            return None
        trace = execute(server, "HGET", self.keys.dead_letter(id_), "traceback")
        return replace(found[0], traceback=text(trace or b""))

    def message(self, server: redis.Redis, id_: str) -> bytes:
        """Return the whole message of a letter, or nothing."""
        return as_message(execute(server, "HGET", self.keys.dead_letter(id_), "message") or b"")

    def count(
        self,
        server: redis.Redis,
        *,
        task: str | None,
        cause: str | None,
        since: float | None,
        before: float | None = None,
    ) -> int:
        """Count the letters that were not replayed."""
        kinds = self._kinds(server, task, cause)
        if since is None and before is None:
            return sum(kinds.values())
        edges = _edges(since, before)
        commands = [("ZCOUNT", self.keys.dead_of(kind), *edges) for kind in kinds]
        return sum(map(int, checked(pipelined(server, commands)))) if commands else 0

    def walk(
        self,
        server: redis.Redis,
        *,
        task: str | None,
        cause: str | None,
        since: float | None,
        before: float | None = None,
        oldest_first: bool = False,
        replayed: bool = False,
        page: int = _AT_ONCE,
    ) -> Iterator[DeadLetter]:
        """Yield letters, the newest first, some at a time, so that Redis is blocked for nobody.

        One that is kept or removed meanwhile may be there, or not; none is there twice.
        """
        sources = self._sources(server, task, cause, replayed=replayed)
        edges = _edges(since, before)
        for ids in self._pages(server, sources, edges, oldest_first=oldest_first, page=page):
            for letter in self._read(server, ids):
                is_asked_for = task in (None, letter.task) and cause in (None, letter.cause)
                if is_asked_for and (letter.replayed_as is not None) == replayed:
                    yield letter

    def _sources(
        self, server: redis.Redis, task: str | None, cause: str | None, *, replayed: bool
    ) -> list[str]:
        """Return the indexes that have them all."""
        if replayed:
            return [f"{self.keys.dead}replayed"]
        if task is None and cause is None:
            return [f"{self.keys.dead}all"]
        return [self.keys.dead_of(kind) for kind in self._kinds(server, task, cause)]

    def _pages(
        self,
        server: redis.Redis,
        sources: Sequence[str],
        edges: _Edges,
        *,
        oldest_first: bool,
        page: int,
    ) -> Iterator[list[str]]:
        index = _Index(*edges, oldest_first=oldest_first, page=page)
        # The first rows of all in one go: there can be hundreds of them.
        first = checked(pipelined(server, [index.rows(source) for source in sources]))
        rows = [
            self._rows(server, source, index, list(pairs(found)))
            for source, found in zip(sources, first, strict=True)
        ]
        merged = heapq.merge(*rows, key=lambda row: row[0] if oldest_first else -row[0])
        while ids := [id_ for _, id_ in islice(merged, page)]:
            yield ids

    def _rows(
        self,
        server: redis.Redis,
        source: str,
        index: _Index,
        found: list[tuple[str, float]],
    ) -> Iterator[tuple[float, str]]:
        """Yield the members of one index by their scores, though others come and go."""
        edge: float | None = None
        at_edge: set[str] = set()
        while new := [(score, id_) for id_, score in found if id_ not in at_edge]:
            yield from new
            last = new[-1][0]
            # Those of the same millisecond are met again.
            at_edge = {id_ for score, id_ in new if score == last} | (
                at_edge if last == edge else set()
            )
            edge = last
            found = list(pairs(execute(server, *index.rows(source, edge, len(at_edge)))))

    def _kinds(self, server: redis.Redis, task: str | None, cause: str | None) -> dict[str, int]:
        found = execute(server, "HGETALL", f"{self.keys.dead}counts")
        counts = {text(kind): int(count) for kind, count in found.items()}
        return {
            kind: count
            for kind, count in counts.items()
            if cause in (None, kind.partition(":")[0]) and task in (None, kind.partition(":")[2])
        }

    def _read(self, server: redis.Redis, ids: Iterable[str]) -> list[DeadLetter]:
        names = list(ids)
        keys = [self.keys.dead_letter(id_) for id_ in names]
        wanted = ("about", "at", "replay_id", "replayed")
        rows = checked(pipelined(server, [("HMGET", key, *wanted) for key in keys]))
        sizes = checked(pipelined(server, [("HSTRLEN", key, "message") for key in keys]))
        return [
            read_letter(id_, row, int(size))
            for id_, row, size in zip(names, rows, sizes, strict=True)
            # Without a time it is yet to be kept: a part of that was refused.
            if row[0] is not None and row[1] is not None
        ]


def _edges(since: float | None, before: float | None) -> _Edges:
    """Return the scores between which an index has them."""
    return (
        "-inf" if since is None else since * 1000,
        "+inf" if before is None else f"({before * 1000}",
    )
