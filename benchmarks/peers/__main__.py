"""Run the scenarios that break locks: ``python -m benchmarks.peers [--only NAME]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import machine


def main(arguments: list[str] | None = None) -> int:
    """Run, print a line for each, and say by the exit code whether ours was right in all."""
    try:
        from benchmarks.peers.app import OURS, SYSTEMS
        from benchmarks.peers.scenarios import SCENARIOS
    except ImportError as error:
        raise SystemExit(f"{error}: pip install celery-once six celery-singleton") from error
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="one or more of them")
    parser.add_argument("--systems", choices=SYSTEMS, action="append", help="one or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was seen here")
    given = parser.parse_args(arguments)
    # Celery would tell servers that are gone of results that are collected.
    sys.unraisablehook = lambda _: None
    made_with = machine.describe()
    machine.introduce(made_with)
    rows, is_right = [], True
    for name in given.only or SCENARIOS:
        scenario = SCENARIOS[name]
        print(f"\n{(scenario.__doc__ or '').strip()}")
        for system in given.systems or SYSTEMS:
            seen = scenario(system)
            print(
                f"  {system:<17} {'right' if seen.is_right else 'WRONG':<6} {seen.text}", flush=True
            )
            rows.append(
                {
                    "scenario": name,
                    "system": system,
                    "text": seen.text,
                    "is_right": seen.is_right,
                }
            )
            is_right &= seen.is_right or system != OURS
    if given.json:
        given.json.write_text(json.dumps({**made_with, "rows": rows}, indent=2))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
