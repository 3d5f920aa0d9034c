"""``celery -A proj reliable locks``: the `@once` keys that are taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click
from celery import Celery

from reliable_tasks._cli.output import (
    duration,
    errors_told,
    json_option,
    perhaps,
    table,
    yes_option,
)
from reliable_tasks._once.locks import locks_of
from reliable_tasks._store.claims import Claims
from reliable_tasks._store.records import Record, State, look_at, walk

__all__ = ["locks"]

_HEADINGS = ("key", "task", "owner", "state", "age", "left")


@click.group(invoke_without_command=True)
@click.pass_context
def locks(context: click.Context) -> None:
    """Look at the @once keys that are taken, and free one."""
    if context.invoked_subcommand is None:
        context.invoke(list_)


@locks.command("list")
@click.option("--task", help="Only the keys of this task.")
@json_option
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
@json_option
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
@yes_option
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
    with errors_told():
        yield locks_of(app).claims


def _find(claims: Claims, key: str) -> Record:
    record = look_at(claims, key)
    if record is not None:
        return record
    similar = (one.name for one in walk(claims) if key in one.name)
    raise click.ClickException(f"nobody has the key {key}{perhaps(similar)}")


def _json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def _fields(record: Record) -> dict[str, str]:
    return {
        "key": record.name,
        "task": record.task,
        "owner": record.owner,
        "state": record.state,
        "attempt": str(record.attempt),
        "age": duration(record.age),
        "left": duration(record.expires_in),
        "fence": record.fence,
    }


def _table(records: Iterable[Record]) -> Iterator[str]:
    rows = (tuple(_fields(record)[name] for name in _HEADINGS) for record in records)
    return table(_HEADINGS, rows, empty="no key is taken")
