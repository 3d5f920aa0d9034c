"""``reliable-tasks demo`` and ``python -m reliable_tasks.demo``."""

from __future__ import annotations

import random
from pathlib import Path

import click

from reliable_tasks.demo._load import Load, gather
from reliable_tasks.demo._outcome import Outcome
from reliable_tasks.demo._run import CHILDREN, WORKERS, CannotRun, run
from reliable_tasks.demo._screen import Screen
from reliable_tasks.demo._stop import Stopped, StopSignals
from reliable_tasks.demo._table import table
from reliable_tasks.demo._workers import forget_celery_environment
from reliable_tasks.errors import MissingExtra

__all__ = ["demo", "main"]

_BROKEN = 1


class _Failure(click.ClickException):
    """The demo can not be shown."""

    exit_code = 2


@click.group()
def main() -> None:
    """Celery tasks that are never lost, never run twice at once, and never stuck."""


@main.command()
@click.option(
    "--input",
    "directory",
    type=click.Path(exists=True, file_okay=False, readable=True, path_type=Path),
    help="The files to work on.  [default: the Python standard library's sources]",
)
@click.option("--seed", type=int, help="Repeats a choice of files, order and kills.")
@click.pass_context
def demo(context: click.Context, directory: Path | None, seed: int | None) -> None:
    """Kill workers in the middle of their tasks, and show what becomes of the tasks.

    Two real prefork workers hash files and count their words while they are killed: first with
    Celery set up the usual way, then with this library. Ends with a table, within two minutes,
    and with exit code 1 if this library broke a promise.
    """
    seed = random.randrange(10_000) if seed is None else seed
    forget_celery_environment()
    screen = Screen()
    try:
        with StopSignals() as stop:
            load = gather(directory, seed, stop.check)
            if not load.items:
                raise click.BadParameter(
                    f"no file can be used in {directory}{_skipped(load)}", param_hint="'--input'"
                )
            screen.say(_introduction(load, seed))
            usual = _run("usual", load, seed, stop, screen)
            ours = _run("reliable_tasks", load, seed, stop, screen)
    except Stopped as stopped:
        screen.clear()
        click.echo("stopped; nothing is left running", err=True)
        context.exit(stopped.exit_code)
    except (MissingExtra, CannotRun) as problem:
        screen.clear()
        raise _Failure(str(problem)) from problem
    click.echo(f"\n{table(usual, ours)}\n\n{_explanation(usual, ours)}")
    for outcome in (usual, ours):
        for wrong in outcome.wrong:
            click.echo(f"wrong result ({outcome.name}): {wrong}")
    if ours.broken:
        click.echo(f"\nreliable_tasks broke its promise: {', '.join(ours.broken)}", err=True)
        context.exit(_BROKEN)


def _run(name: str, load: Load, seed: int, stop: StopSignals, screen: Screen) -> Outcome:
    screen.say(f"\n{name}")
    outcome = run(name, load, seed, stop, screen)
    for log in outcome.deserters:
        screen.say(f"A worker ended although nobody killed it. The end of its log:\n{log}")
    return outcome


def _introduction(load: Load, seed: int) -> str:
    left_out = f", {load.left_out} more do not fit into the time" if load.left_out else ""
    return (
        f"{len(load.items)} files of {load.root}{left_out}{_skipped(load)}\n"
        f"{WORKERS} workers with {CHILDREN} children each; --seed {seed} repeats this choice"
    )


def _skipped(load: Load) -> str:
    if not load.skipped:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(load.skipped.items()))
    return f"; skipped: {reasons}"


def _explanation(usual: Outcome, ours: Outcome) -> str:
    return f"""\
usual: acks_late, reject_on_worker_lost and celery-once, all else as Celery has it.
The same files, kills and deadline for both. Nobody waits for what is due after the deadline:
a dead worker's tasks come back {usual.redelivery:g} s after they were fetched (usual), or when
its connection is gone and it missed two beats, at the latest after {ours.redelivery:g} s
(reliable_tasks).
Never noted down: stock kombu takes a message first and notes it afterwards; a worker that is
killed in between takes it with it."""


if __name__ == "__main__":
    demo(prog_name="python -m reliable_tasks.demo")
