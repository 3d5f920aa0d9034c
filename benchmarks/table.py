"""Who has the key of a once-task, in whichever way it ends: ``python -m benchmarks.table``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine

_TESTS = "tests/integration/test_ends.py"
_OUTCOME = Path(__file__).with_name("table.md")
_HEAD = """\
# Who has the key

What `make bench-table` has seen of a `@once` key before, while and after its task ran, with real
workers and a real server: each lifetime, each way of ending, each pool. The tests in
`{tests}` say what it must be, and that nobody else had it.

* *free*: nobody has it, and the next call is a new one.
* *owned*: its task has it, and does not run.
* *held*: its task has it, and runs.
* *turn*: its task runs, and others with the key wait for it; a call of one may be queued.
* *unconfirmed*: its call failed on the way, and is queued or is not: the next one takes its place.

{made_with}
"""


#: Where, how it ended, of which lifetime: the moments and what was seen then.
Rows = dict[str, dict[str, dict[str, list[tuple[str, str]]]]]


class _Seen:
    """What the rows of the table were, as pytest reports them."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "row":
                where, ending, seen = value
                # A solo worker's rows come in parts.
                self.rows.setdefault(where, {}).setdefault(ending, {}).update(seen)


def main(arguments: list[str] | None = None) -> int:
    """Run all rows, write down what was seen, and say by the exit code whether it was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4, help="test processes (default: 4)")
    given = parser.parse_args(arguments)
    os.environ["RT_TABLE"] = "all"
    seen = _Seen()
    options = ["-q", "-n", str(given.processes), "--dist", "loadgroup"]
    code = int(pytest.main([_TESTS, *options], plugins=[seen]))
    if code:
        print("BROKEN: the table is not written", file=sys.stderr)
        return code
    _OUTCOME.write_text(_as_text(seen.rows))
    return 0


def _as_text(rows: Rows) -> str:
    from tests.integration.apps.ends import LIFETIMES
    from tests.integration.test_ends import OF_CALLS, OF_TASKS, OF_WORKERS, POOLS

    made_with = ", ".join(f"{name} {value}" for name, value in machine.describe().items())
    parts = [_HEAD.format(tests=_TESTS, made_with=made_with)]
    endings = [*OF_TASKS, *OF_WORKERS]
    order = [str(ending) for ending in (*endings, *OF_CALLS)]
    for where in (*POOLS, *sorted(set(rows) - set(POOLS))):
        parts += [f"## {where}", ""]
        parts += [f"| how it ends | when | {' | '.join(LIFETIMES)} |"]
        parts += ["|---" * (2 + len(LIFETIMES)) + "|"]
        for ending in sorted(rows[where], key=order.index):
            columns = [rows[where][ending][lifetime] for lifetime in LIFETIMES]
            # Moments in lines below each other, as far as Markdown has such.
            cells = ["<br>".join(moment for moment, _ in columns[0])]
            cells += ["<br>".join(state for _, state in column) for column in columns]
            parts.append(f"| {ending} | {' | '.join(cells)} |")
        parts.append("")
        left_out = [one for one in endings if where in one.not_in]
        parts += [f"- No *{one.name}*: {one.not_in[where]}." for one in left_out]
        parts += [""] if left_out else []
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
