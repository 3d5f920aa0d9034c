"""``python -m benchmarks.chaos SCENARIO``, from the root of the repository."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from benchmarks import machine
from benchmarks.chaos import failover, kills, leases, outages, recovery, storm, zombie
from benchmarks.chaos.account import Row
from benchmarks.chaos.app import OURS, STOCK, STOCK_DEFAULTS

SCENARIOS: dict[str, ModuleType] = {
    "kills": kills,
    "storm": storm,
    "leases": leases,
    "recovery": recovery,
    "outages": outages,
    "failover": failover,
    "zombie": zombie,
}
_SYSTEMS = {"ours": OURS, "stock": STOCK}
#: The first column holds the longest name of a system.
_FIRST = len(STOCK_DEFAULTS) + 1


def main(arguments: list[str] | None = None) -> int:
    """Run a scenario; return 1 if this library broke its promise."""
    given = _parse(arguments)
    scenario = SCENARIOS[given.scenario]
    made_with = machine.describe(seed=given.seed)
    machine.introduce(made_with)
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in given.systems.split(","):
        for row in scenario.run(given, _SYSTEMS[name]):
            _show(row, with_head=not rows)
            rows.append(row)
    if given.json:
        kept = {"scenario": given.scenario, **made_with, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(kept, indent=2, default=str) + "\n")
    broken = [what for row in rows if row.system == OURS for what in row.broken]
    for what in broken:
        print(f"BROKEN: {what}")
    return 1 if broken else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=1, help="what is drawn, and when (default: 1)")
    common.add_argument("--quick", action="store_true", help="a small run, for CI")
    common.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    common.add_argument("--logs", type=Path, metavar="DIR", help="keep the workers' logs here")
    common.add_argument("--systems", default="ours,stock", help="default: ours,stock")
    parser = argparse.ArgumentParser(description=__doc__)
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    for name, scenario in SCENARIOS.items():
        about = (scenario.__doc__ or "").splitlines()[0]
        scenario.add_arguments(scenarios.add_parser(name, parents=[common], help=about))
    return parser.parse_args(arguments)


def _show(row: Row, *, with_head: bool) -> None:
    if with_head:
        print(" " * _FIRST + "".join(f"{name:>{_width(name)}}" for name in row.numbers))
    cells = (f"{_text(value):>{_width(name)}}" for name, value in row.numbers.items())
    print(f"{row.system:<{_FIRST}}" + "".join(cells), flush=True)


def _width(name: str) -> int:
    return max(len(name), 11) + 2


def _text(value: object) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
