"""What the page on dead letters says of causes, signals, metrics and settings is in the code."""

from __future__ import annotations

import re
from dataclasses import fields

import prometheus_client
import pytest

from reliable_tasks import ReliableConfig
from reliable_tasks.dead_letters import Cause
from reliable_tasks.instrumentation import prometheus, signals
from tests.docs.fences import ROOT

PAGE = (ROOT / "docs" / "dead_letters.md").read_text("utf-8")


def _names(head: str, column: int = -1) -> dict[str, list[str]]:
    """Return what is named in a column of the table with this head, by the names of the rows."""
    table = PAGE.partition(f"\n{head}\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split("|") for line in table.splitlines()[1:]]
    quoted = re.compile(r"`([^`]+)`")
    return {quoted.findall(row[0])[0]: quoted.findall(row[column]) for row in rows}


def test_every_cause_is_explained() -> None:
    """Whoever reads a cause in the list finds it in the page."""
    assert set(_names("| cause | when |")) == set(Cause)


def test_every_signal_is_explained_with_what_it_has() -> None:
    """The table has the signals of crashes and dead letters; the others are those of claims."""
    told = _names("| [signal](api.md#signals) | sent when | with |")
    assert {name for name in signals.__all__ if not name.startswith("claim_")} == set(told)
    providing = {name: getattr(signals, name).providing_args for name in told}
    assert {name: set(names) for name, names in told.items()} == providing


def test_every_metric_is_explained() -> None:
    """The table has what is registered, with its labels."""
    told = _names("| metric | labels | what |", column=1)
    registered = {f"reliable_{name}": list(labels) for _, name, labels, _ in prometheus._COUNTERS}
    registry = prometheus_client.CollectorRegistry()
    registry.register(prometheus._DeadLetters(lambda: 0))
    registered |= {metric.name: [] for metric in registry.collect()}
    assert registered == told


@pytest.mark.parametrize(
    "setting",
    [one.name for one in fields(ReliableConfig) if one.name.startswith(("max_", "dead_letter"))],
)
def test_every_setting_is_explained(setting: str) -> None:
    """Each of them stands in the page."""
    assert f"reliable_{setting}" in PAGE


def test_the_bounds_are_the_defaults() -> None:
    """The table of bounds has the settings' defaults."""
    config = ReliableConfig()
    bounds = PAGE.partition("| | setting | default |")[2].partition("\n\n")[0]
    assert f"{config.dead_letter_max_age / 86400:.0f} days" in bounds
    assert f"{config.dead_letter_max_count:,} |" in bounds
    assert f"{config.dead_letter_max_body:,} bytes" in bounds
