"""``celery -A proj reliable locks``: the `@once` keys that are taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

import click
from celery import Celery

from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.records import Record, State, look_at, walk
from reliable_tasks.errors import ReliableError

__all__ = ["locks"]

#: A table is as wide as its first so many rows.
_MEASURED = 500
_HEADINGS = ("key", "task", "owner", "state", "age", "left")
#: So many keys are named where a wrong one was given.
_SUGGESTED = 5

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


@click.group(invoke_without_command=True)
@click.pass_context
def locks(context: click.Context) -> None:
    """Look at the @once keys that are taken, and free one."""
    if context.invoked_subcommand is None:
        context.invoke(list_)


@locks.command("list")
@click.option("--task", help="Only the keys of this task.")
@_as_json
@click.pass_context
def list_(context: click.Context, task: str | None = None, as_json: bool = False) -> None:
    """List the keys that are taken: by which task, since when, and for how long at most.

    Redis is read in small steps and is blocked for nobody. The keys come in no order.
    """
    with _claims(context) as claims:
        found = (one for one in walk(claims) if task in (None, one.task))
        for line in map(_json, found) if as_json else _table(found):
            click.echo(line)


@locks.command()
@click.argument("key")
@_as_json
@click.pass_context
def show(context: click.Context, key: str, as_json: bool) -> None:
    """Show who has a KEY, as the list names it."""
    with _claims(context) as claims:
        record = _find(claims, key)
    if as_json:
        click.echo(_json(record))
        return
    for name, value in _fields(record).items():
        click.echo(f"{name:<10}  {value}")


@locks.command()
@click.argument("key")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def free(context: click.Context, key: str, yes: bool) -> None:
    """Free a KEY: the next call with it is queued, whatever became of the task that has it.

    Nothing is done to that task: if it waits or runs it goes on, and another one can run beside it.
    """
    with _claims(context) as claims:
        record = _find(claims, key)
        if record.state is State.UNREADABLE:
            raise click.ClickException(
                f"{key} is no claim of this library: look at it with redis-cli, and delete it there"
            )
        if not yes:
            _ask(record)
        if not claims.free(record.name, owner=record.owner, fence=record.fence):
            raise click.ClickException(
                f"{key} is not freed: it has changed hands since; look again with 'locks show'"
            )
    click.echo(f"{key} is free")


def _ask(record: Record) -> None:
    doing = {
        State.QUEUED: "waits in its queue, and will run all the same",
        State.RUNNING: "runs right now, and another one can run beside it then",
        State.INTERRUPTED: "was interrupted, and will run again when its message comes back",
        State.WINDOW: "was called, and has the key until its window is over",
    }
    click.echo(f"Task {record.task}[{record.owner}] {doing[record.state]}.", err=True)
    click.confirm(f"Free {record.name}?", abort=True, err=True)


@contextmanager
def _claims(context: click.Context) -> Iterator[Claims]:
    app: Celery = context.obj.app
    try:
        yield locks_of(app).claims
    except ReliableError as error:
        raise click.ClickException(str(error)) from error


def _find(claims: Claims, key: str) -> Record:
    record = look_at(claims, key)
    if record is not None:
        return record
    similar = islice((one.name for one in walk(claims) if key in one.name), _SUGGESTED)
    names = "".join(f"\n  {name}" for name in similar)
    hint = f"; perhaps you mean{names}" if names else ""
    raise click.ClickException(f"nobody has the key {key}{hint}")


def _json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def _fields(record: Record) -> dict[str, str]:
    return {
        "key": record.name,
        "task": record.task,
        "owner": record.owner,
        "state": record.state,
        "attempt": str(record.attempt),
        "age": _duration(record.age),
        "left": _duration(record.expires_in),
        "fence": record.fence,
    }


def _table(records: Iterable[Record]) -> Iterator[str]:
    rows = (tuple(_fields(record)[name] for name in _HEADINGS) for record in records)
    first = [_HEADINGS, *islice(rows, _MEASURED)]
    if len(first) == 1:
        yield "no key is taken"
        return
    widths = [max(map(len, column)) for column in zip(*first, strict=True)]
    for row in chain(first, rows):
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def _duration(seconds: float) -> str:
    """Say how long something is, in the two largest units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next((n for n, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])
