"""The table that the demo ends with."""

from __future__ import annotations

from collections.abc import Callable

from reliable_tasks.demo._chaos import Target
from reliable_tasks.demo._outcome import Outcome

__all__ = ["table"]

_LABEL, _COLUMN = 46, 16


def table(usual: Outcome, ours: Outcome) -> str:
    """Set the outcomes beside each other."""
    contenders = (usual, ours)

    def row(label: str, cell: Callable[[Outcome], object]) -> str:
        return f"{label:<{_LABEL}}" + "".join(f"{cell(one)!s:>{_COLUMN}}" for one in contenders)

    rule = "-" * (_LABEL + 2 * _COLUMN)
    lines = [
        row("", lambda one: one.name),
        rule,
        row("calls, each file at least twice", lambda one: one.calls),
        row("  duplicates, not queued", lambda one: one.calls - one.accepted),
        row("  tasks queued", lambda one: one.accepted),
        row("SIGKILLs: pool children, whole workers", _kills),
        rule,
        row("done", lambda one: one.done),
        row("lost: not done at the end", lambda one: one.lost),
        row("  held for a dead worker", lambda one: one.waiting),
        row("  still in the queue", lambda one: one.queued),
        row("  gone for good", lambda one: one.gone),
        row("  taken, and never noted down", lambda one: one.in_window),
        row("run twice at once", lambda one: one.twice_at_once),
        row("run again after a crash", lambda one: one.repeated),
        row("locks left behind", lambda one: len(one.locks)),
        row("wrong results", lambda one: len(one.wrong)),
        rule,
        "seconds from kill to restart: median, longest",
        row("  pool child", lambda one: _seconds(one, "child")),
        row("    restarted, of those interrupted", lambda one: _share(one, "child")),
        row("  whole worker", lambda one: _seconds(one, "worker")),
        row("    restarted, of those interrupted", lambda one: _share(one, "worker")),
        row("visibility timeout or lease (s)", lambda one: f"{one.redelivery:g}"),
        row("seconds in all", lambda one: f"{one.seconds:.0f}"),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _kills(one: Outcome) -> str:
    children = sum(kill.target == "child" for kill in one.kills)
    return f"{children}, {len(one.kills) - children}"


def _seconds(one: Outcome, target: Target) -> str:
    found = one.restarts[target]
    return f"{found.median:.1f}, {max(found.seconds):.1f}" if found.seconds else "-"


def _share(one: Outcome, target: Target) -> str:
    found = one.restarts[target]
    return f"{len(found.seconds)} of {found.interrupted}"
