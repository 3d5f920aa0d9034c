"""``celery -A proj reliable dead``: tasks that will not run again by themselves."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

import click
from celery import Celery

from reliable_tasks import dead_letters
from reliable_tasks._cli import wording
from reliable_tasks._cli.output import (
    errors_told,
    json_option,
    one_line,
    perhaps,
    plain,
    progress,
    yes_option,
)
from reliable_tasks._dead.queue import Queued, is_in_queue
from reliable_tasks._dead.which import Which
from reliable_tasks._store.letters import Cause, DeadLetter
from reliable_tasks.errors import (
    DeadLetterError,
    DeadLetterNotFound,
    ReplayRefused,
)

__all__ = ["dead"]

#: So many dead letters are named in a question.
_NAMED = 10
#: One in this many seconds is as slow as a replay can be asked for.
_SLOWEST = 1000.0

_AGO = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _moment(value: str) -> datetime:
    """Return the moment that is meant, so that a question and what follows are about the same."""
    try:
        if ago := _AGO.fullmatch(value.strip()):
            when = datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        else:
            when = datetime.fromisoformat(value.strip())
        # What names no time zone is in that of who types it.
        return when.astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value!r} is no time: give how long ago, as 30s, 15m, 2h or 7d, or a date or a date "
            "and time, as 2026-03-01 or 2026-03-01T08:30"
        ) from None


def _name(value: str) -> str:
    if not value.strip():
        raise click.BadParameter(f"{value!r} names nothing")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter(f"{value!r} is no UTF-8, as all names are") from error
    return value


def _rate(value: str) -> float:
    with suppress(ValueError):
        if 1 / _SLOWEST <= float(value) < float("inf"):
            return float(value)
    raise click.BadParameter(
        f"{value!r}: give a number of dead letters per second, {1 / _SLOWEST:g} or more"
    )


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which dead letters; they are named as in the API."""
    for option in (
        click.option(
            "--before",
            type=_moment,
            metavar="WHEN",
            help="Only those that were kept before; the same.",
        ),
        click.option(
            "--since",
            type=_moment,
            metavar="WHEN",
            help="Only those that were kept since then: 30s, 15m, 2h or 7d ago, or a date, or a "
            "date and time.",
        ),
        click.option(
            "--cause",
            type=click.Choice([cause.value for cause in Cause]),
            help="Only those that are here for this.",
        ),
        click.option("--task", type=_name, metavar="NAME", help="Only those of this task."),
    ):
        command = option(command)
    return command


_replayed_option = click.option(
    "--replayed",
    is_flag=True,
    help="Those that were replayed instead; --since and --before are about when that was.",
)
_dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say what would be done, and ask nothing."
)


@click.group(invoke_without_command=True)
@click.pass_context
def dead(context: click.Context) -> None:
    """Look at tasks that will not run again by themselves, and replay or remove them."""
    if context.invoked_subcommand is None:
        context.invoke(list_)


@dead.command("list")
@_filters
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="At most so many.",
)
@_replayed_option
@json_option
@click.pass_context
def list_(
    context: click.Context, /, limit: int, replayed: bool, as_json: bool, **filters: Any
) -> None:
    """List dead letters, the newest first.

    Redis is read in small steps and is blocked for nobody. Without one, those in RabbitMQ's queue
    come in its order, the oldest first.
    """
    app = _app(context)
    with errors_told():
        found = [*dead_letters.list(**filters, limit=limit, replayed=replayed, app=app)]
        empty = wording.none(filters, replayed)
        as_table = wording.listing(found, replayed, empty)
        for line in map(wording.as_json, found) if as_json else as_table:
            click.echo(line)
        if len(found) < limit:
            return
        count = _count(app, filters, replayed)
    if count > limit:
        click.echo(f"{count - limit} more: see them with --limit {count}", err=True)


@dead.command()
@click.argument("id_", type=_name, metavar="ID")
@click.option(
    "--body",
    "with_message",
    is_flag=True,
    help="The whole message, too, with the task's arguments: they can hold secrets.",
)
@json_option
@click.pass_context
def show(context: click.Context, id_: str, with_message: bool, as_json: bool) -> None:
    """Show all that is known of the dead letter ID."""
    app = _app(context)
    with errors_told():
        letter = _get(app, id_)
        message = dead_letters.message(id_, app=app) if with_message else None
    if as_json:
        more = {} if message is None else {"message": message}
        click.echo(json.dumps({**letter.as_dict(), **more}))
        return
    for name, value in wording.fields(letter).items():
        click.echo(f"{name:<12}  {one_line(value)}".rstrip())
    if message:
        click.echo(f"\nmessage:\n{plain(message)}")
    if letter.traceback:
        click.echo(f"\ntraceback:\n{plain(letter.traceback)}")


@dead.command()
@click.argument("ids", type=_name, metavar="[ID]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="All, or all that the filters leave.")
@_filters
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Send at most so many of --all, the oldest that can be.",
)
@click.option("--rate", type=_rate, metavar="N", help="At most so many a second.")
@click.option(
    "--queue",
    type=_name,
    metavar="NAME",
    help="Send them to this queue, not to the one that they came by.",
)
@click.option(
    "--whole-chord",
    is_flag=True,
    help="Send the whole chord anew that it is a part of: the parts that have succeeded, too.",
)
@_dry_run_option
@yes_option
@json_option
@click.pass_context
def replay(
    context: click.Context,
    /,
    ids: tuple[str, ...],
    is_all: bool,
    limit: int | None,
    rate: float | None,
    queue: str | None,
    whole_chord: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Send the tasks of the dead letters ID... again, or of --all, under new ids.

    Each is sent once, however often it is asked for. One that cannot be stays, and is named with
    the reason; the exit code is 1 then.
    """
    if bool(ids) == is_all:
        raise click.UsageError("give the ids of dead letters, or --all")
    given = [name for name, value in {**filters, "limit": limit}.items() if value is not None]
    if ids and given:
        raise click.UsageError(f"--{given[0]} is for --all, and ids were given")
    if is_all and whole_chord:
        raise click.UsageError("--whole-chord is for ids, not for --all")
    app = _app(context)
    outcomes = _Outcomes(app, as_json)
    with errors_told():
        # A task that is not imported would be sent by its name, past its @once.
        app.loader.import_default_modules()
        if dry_run and is_all:
            _check_all(app, filters, limit, outcomes)
        elif dry_run:
            _check_each(app, dict.fromkeys(ids), outcomes, whole_chord=whole_chord)
        elif is_all:
            options = {**filters, "limit": limit, "rate": rate, "queue": queue}
            _replay_all(app, filters, limit, options, yes, outcomes)
        else:
            _replay_each(app, ids, rate, outcomes, queue=queue, whole_chord=whole_chord)
    if is_all and not as_json:
        outcomes.sum_up(wording.none(filters), dry_run)
    if outcomes.refused:
        context.exit(1)


@dead.command()
@click.argument("ids", type=_name, metavar="ID...", nargs=-1, required=True)
@_dry_run_option
@yes_option
@click.pass_context
def discard(context: click.Context, ids: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove the dead letters ID... for good.

    If one is not found, none is removed.
    """
    app = _app(context)
    with errors_told():
        letters = [_get(app, id_) for id_ in dict.fromkeys(ids)]
        if dry_run:
            for letter in letters:
                click.echo(f"{letter.id} would be discarded")
            return
        if not yes:
            _ask(letters)
        for letter in letters:
            try:
                dead_letters.discard(letter.id, app=app)
            except DeadLetterNotFound:
                click.echo(f"{letter.id} is gone already", err=True)
            else:
                click.echo(f"{letter.id} is discarded")


@dead.command()
@_filters
@_replayed_option
@_dry_run_option
@yes_option
@click.pass_context
def purge(
    context: click.Context, /, replayed: bool, dry_run: bool, yes: bool, **filters: Any
) -> None:
    """Remove all dead letters for good, or all that the filters leave.

    Those that were replayed stay, but with --replayed.
    """
    app = _app(context)
    with errors_told():
        chosen = _choose(app, filters, replayed)
        if not chosen.count:
            click.echo(wording.none(filters, replayed))
            return
        named = wording.named(chosen.count, filters, replayed=replayed)
        if dry_run:
            click.echo(f"would remove {named}")
            return
        if not yes:
            click.confirm(f"Remove {named} for good?", abort=True, err=True)
        with progress(chosen.count, "Removing") as step:
            removed = dead_letters.purge(
                chosen.has,
                **filters,
                replayed=replayed,
                on_each=lambda letter: step(),
                app=app,
            )
    click.echo(f"removed {wording.plural(removed)}")


# -- which ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The dead letters that a question is about.

    Attributes:
        count: How many.
        has: Says whether one is among them: none that came while somebody thought about it.
    """

    count: int
    has: Callable[[DeadLetter], bool]


def _choose(app: Celery, filters: Mapping[str, Any], replayed: bool = False) -> _Chosen:
    asked_at = dead_letters.now_of(app)
    if replayed or asked_at is None:
        # No one clock says which were there.
        found = [one.id for one in dead_letters.list(**filters, replayed=replayed, app=app)]
        ids = frozenset(found)
        return _Chosen(len(found), lambda letter: letter.id in ids)
    return _Chosen(_count(app, filters), lambda letter: letter.at <= asked_at)


def _count(app: Celery, filters: Mapping[str, Any], replayed: bool = False) -> int:
    if not replayed:
        # A queue that has them is counted as a whole alone.
        with suppress(DeadLetterError):
            return dead_letters.count(**filters, app=app)
    return sum(1 for _ in dead_letters.list(**filters, replayed=replayed, app=app))


def _app(context: click.Context) -> Celery:
    app: Celery = context.obj.app
    return app


def _get(app: Celery, id_: str) -> DeadLetter:
    try:
        return dead_letters.get(id_, app=app)
    except DeadLetterNotFound as error:
        raise click.ClickException(f"{error}{perhaps(_similar(app, id_))}") from error


def _similar(app: Celery, id_: str) -> list[str]:
    """Return ids that begin with what was given, and then those that contain it."""
    letters = (dead_letters.list(replayed=replayed, app=app) for replayed in (False, True))
    ids = [one.id for one in chain.from_iterable(letters) if id_ in one.id]
    return sorted(ids, key=lambda id_found: not id_found.startswith(id_))


# -- doing ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Outcomes:
    """Writes what came of each dead letter that was to be replayed.

    Attributes:
        app: The app.
        as_json: Whether it is written for programs.
        sent: How many were sent, or would be.
        refused: How many were not.
    """

    app: Celery
    as_json: bool
    sent: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)

    def send(self, id_: str, new_id: str) -> None:
        """Write that one was sent, and under which id."""
        self.sent += 1
        self._write({"id": id_, "replayed_as": new_id}, f"{id_} -> {new_id}")

    def would_send(self, letter: DeadLetter) -> None:
        """Write that one would be sent."""
        self.sent += 1
        line = f"{letter.id} would be sent again: {one_line(letter.task)}"
        self._write({"id": letter.id, "replayed_as": None}, line)

    def refuse(self, error: ReplayRefused | DeadLetterNotFound) -> None:
        """Write why one was not sent, or would not be."""
        if isinstance(error, ReplayRefused):
            self._refuse(error.id, error.reason, str(error))
            return
        # All ids are read to find those that are like it: not for each of a thousand that are gone.
        hint = "" if self.refused or self.as_json else perhaps(_similar(self.app, error.id))
        self._refuse(error.id, str(error), f"{error}{hint}")

    def _refuse(self, id_: str, reason: str, line: str) -> None:
        self.refused += 1
        self._write({"id": id_, "refused": reason}, line, err=not self.as_json)

    def _write(self, found: dict[str, Any], line: str, err: bool = False) -> None:
        click.echo(json.dumps(found) if self.as_json else plain(line), err=err)

    def sum_up(self, empty: str, dry_run: bool) -> None:
        """Write how many there were."""
        if not (self.sent or self.refused):
            click.echo(empty)
            return
        would = "would be " if dry_run else ""
        click.echo(f"{self.sent} {would}sent, {self.refused} {would}refused", err=True)


def _check_all(
    app: Celery, filters: Mapping[str, Any], limit: int | None, outcomes: _Outcomes
) -> None:
    if not is_in_queue(app):
        oldest = dead_letters.list(**filters, oldest_first=True, app=app)
        _check_each(app, (letter.id for letter in oldest), outcomes, limit=limit)
        return

    def tell(letter: DeadLetter, reason: str) -> None:
        if reason:
            outcomes.refuse(ReplayRefused(letter.id, reason))
        else:
            outcomes.would_send(letter)

    # None is found there by its id.
    Queued(app).check(Which.of(**filters).has, tell, limit=limit)


def _check_each(
    app: Celery,
    ids: Iterable[str],
    outcomes: _Outcomes,
    *,
    whole_chord: bool = False,
    limit: int | None = None,
) -> None:
    for id_ in ids:
        if limit is not None and outcomes.sent >= limit:
            return
        try:
            letter = dead_letters.get(id_, app=app)
            if letter.replayed_as is not None:
                outcomes.send(id_, letter.replayed_as)
                continue
            dead_letters.check(id_, whole_chord=whole_chord, app=app)
        except (ReplayRefused, DeadLetterNotFound) as error:
            outcomes.refuse(error)
        else:
            outcomes.would_send(letter)


def _replay_each(
    app: Celery, ids: Iterable[str], rate: float | None, outcomes: _Outcomes, **options: Any
) -> None:
    for n, id_ in enumerate(dict.fromkeys(ids)):
        if n and rate:
            time.sleep(1 / rate)
        try:
            outcomes.send(id_, dead_letters.replay(id_, **options, app=app))
        except (ReplayRefused, DeadLetterNotFound) as error:
            outcomes.refuse(error)


def _replay_all(
    app: Celery,
    filters: Mapping[str, Any],
    limit: int | None,
    options: Mapping[str, Any],
    yes: bool,
    outcomes: _Outcomes,
) -> None:
    chosen = _choose(app, filters)
    count = chosen.count if limit is None else min(chosen.count, limit)
    if not count:
        return
    if not yes:
        named = wording.named(count, filters, of=chosen.count)
        click.confirm(f"Send {named} again?", abort=True, err=True)
    with progress(count, "Replaying", is_hidden=outcomes.as_json) as step:

        def on_each(letter: DeadLetter, new_id: str | None, reason: str) -> None:
            step()
            if new_id is None:
                outcomes.refuse(ReplayRefused(letter.id, reason))
            else:
                outcomes.send(letter.id, new_id)

        dead_letters.replay_all(chosen.has, **options, on_each=on_each, app=app)


def _ask(letters: Sequence[DeadLetter]) -> None:
    for letter in letters[:_NAMED]:
        about = f"{one_line(letter.task) or 'no task'}, {letter.cause} {wording.age(letter)} ago"
        click.echo(f"{letter.id}: {about}", err=True)
    if len(letters) > _NAMED:
        click.echo(f"and {len(letters) - _NAMED} more", err=True)
    click.confirm(f"Discard {wording.plural(len(letters))} for good?", abort=True, err=True)
