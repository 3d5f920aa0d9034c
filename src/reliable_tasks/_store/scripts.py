"""Loads ``lua/*.lua`` and runs them by their hash."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import resources
from typing import Any, TypeVar

import redis

from reliable_tasks._store.client import Client
from reliable_tasks._store.lines import Lines
from reliable_tasks.errors import ScriptError, StoreUnavailable

__all__ = [
    "AT_ONCE",
    "NO_REPLICAS",
    "Argument",
    "Call",
    "Key",
    "Replicas",
    "Script",
    "Server",
    "checked",
    "execute",
    "leave_replica",
    "load",
    "pipelined",
]

# A reply can be lost after the script ran. Every script is written to be repeated, so one that
# failed on the way is sent again, where redis-py's own retries are off (they cannot know).
_PAUSE = 0.05
#: So many are under way at once where a script is run for many: each blocks the server alone, and
#: their answers need room.
AT_ONCE = 250

_COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)
_USES = re.compile(r"^-- Uses: (.+)$", re.MULTILINE)

_Answer = TypeVar("_Answer")
Key = str | bytes
Argument = str | bytes | int
Call = tuple[Sequence[Key], Sequence[Argument]]
Server = redis.Redis | Lines


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which copies of a write are waited for.

    Attributes:
        count: How many replicas must have it.
        timeout: For how long to wait for them (s).
    """

    count: int
    timeout: float


NO_REPLICAS = Replicas(0, 0.0)


def execute(server: Server, *command: Any) -> Any:
    """Run a command whose keys are complete, also by a client of kombu's that adds a prefix."""
    if isinstance(server, Lines):
        return server.run(command)
    return redis.Redis.execute_command(server, *command)  # type: ignore[no-untyped-call]


def pipelined(
    server: Server, commands: Sequence[Sequence[Any]], *, is_atomic: bool = False
) -> list[Any]:
    """Run commands in one go; return the answers, of which each can be an error."""
    if isinstance(server, Lines):
        return server.run_each(commands)
    pipeline: Any = redis.Redis.pipeline(server, transaction=is_atomic)
    for command in commands:
        pipeline.execute_command(*command)
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    return answers


def checked(answers: list[Any]) -> list[Any]:
    """Return answers; raise the first error among them."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def leave_replica(server: redis.Redis) -> None:
    """Let the next command connect anew, to what is the master now: this one was."""
    server.connection_pool.disconnect(inuse_connections=False)


class Script:
    """One Lua script."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    @cached_property
    def code(self) -> str:
        """The source without its comments, for one that is sent whole each time."""
        return _COMMENT.sub("", self.source)

    def __call__(
        self,
        client: Client,
        keys: Sequence[Key],
        args: Sequence[Argument],
        replicas: Replicas = NO_REPLICAS,
    ) -> Any:
        """Run the script.

        Raises:
            StoreUnavailable: The server could not be reached or did not answer, twice, or for
                as long as the client's timeout; or too few replicas have the write.
            ScriptError: The server refused (no permission, out of memory, read only).
        """
        return self._twice(client, lambda: self.on(client.lines, keys, args, replicas))

    def for_each(
        self, client: Client, calls: Sequence[Call], replicas: Replicas = NO_REPLICAS
    ) -> list[Any]:
        """Run the script for each of some keys and arguments, some hundreds under way at once.

        Raises:
            StoreUnavailable: As when it is called for one; any number of them may have run.
            ScriptError: The server refused one of them.
        """
        answers: list[Any] = []
        for begin in range(0, len(calls), AT_ONCE):
            some = calls[begin : begin + AT_ONCE]
            answers += self._twice(client, partial(self.on_each, client.lines, some, replicas))
        return answers

    def on(
        self,
        server: Server,
        keys: Sequence[Key],
        args: Sequence[Argument],
        replicas: Replicas = NO_REPLICAS,
    ) -> Any:
        """Run the script once on a client of somebody else's, whose errors are left as they are.

        The keys are complete: kombu's client would put its prefix before the first one alone.

        Raises:
            redis.ConnectionError: Too few ``replicas`` have what was written; it is written.
        """
        if replicas.count:
            return self.on_each(server, [(keys, args)], replicas)[0]
        try:
            return execute(server, "EVALSHA", self.sha, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return execute(server, "EVAL", self.source, len(keys), *keys, *args)

    def on_each(
        self, server: Server, calls: Sequence[Call], replicas: Replicas = NO_REPLICAS
    ) -> list[Any]:
        """Run the script once for each of some keys and arguments, all under way at once.

        An error of one is raised when all have run.
        """
        try:
            return self._pipelined(server, calls, replicas, "EVALSHA", self.sha)
        except redis.exceptions.NoScriptError:
            # Mostly none of them has run, and each can be repeated.
            return self._pipelined(server, calls, replicas, "EVAL", self.source)

    def _pipelined(
        self,
        server: Server,
        calls: Sequence[Call],
        replicas: Replicas,
        command: str,
        script: str,
    ) -> list[Any]:
        commands = [(command, script, len(keys), *keys, *args) for keys, args in calls]
        if replicas.count:
            # In one go on one connection: WAIT is about what its own connection has written.
            commands.append(("WAIT", replicas.count, round(replicas.timeout * 1000)))
        answers = checked(pipelined(server, commands))
        if replicas.count and (reached := int(answers.pop())) < replicas.count:
            raise redis.exceptions.ConnectionError(
                f"only {reached} of {replicas.count} replicas have the write after "
                f"{replicas.timeout:g} s (reliable_wait_replicas)"
            )
        return answers

    def _twice(self, client: Client, run: Callable[[], _Answer]) -> _Answer:
        started = time.monotonic()
        try:
            return self._once(client, run)
        except StoreUnavailable:
            if time.monotonic() - started > client.timeout / 2:
                raise
            time.sleep(_PAUSE)
            return self._once(client, run)

    def _once(self, client: Client, run: Callable[[], _Answer]) -> _Answer:
        try:
            return run()
        except redis.exceptions.ReadOnlyError as error:
            leave_replica(client.redis)
            client.lines.close()
            raise StoreUnavailable(client.shown_url, str(error)) from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise StoreUnavailable(client.shown_url, str(error)) from error
        except redis.RedisError as error:
            raise ScriptError(self.name, str(error)) from error


@cache
def load(name: str) -> Script:
    """Return the script in ``lua/<name>.lua``, behind the shared functions that it uses."""
    source = _read(f"{name}.lua")
    used = _USES.search(source)
    shared = [_read("shared", f"{part}.lua") for part in (used[1].split() if used else ())]
    return Script(name, "".join([*shared, source]))


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath("lua", *path).read_text("utf-8")
