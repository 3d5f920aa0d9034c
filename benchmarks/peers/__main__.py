"""Run the scenarios that break locks: ``python -m benchmarks.peers [--only NAME]``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import machine

#: The ninth scenario, which compares all of them and not one after the other.
_RATES = "rates"


def main(arguments: list[str] | None = None) -> int:
    """Run, print a line for each, and say by the exit code whether ours was right in all."""
    try:
        from benchmarks.peers.app import OURS, SYSTEMS
        from benchmarks.peers.scenarios import SCENARIOS
    except ImportError as error:
        raise SystemExit(f"{error}: pip install celery-once six celery-singleton") from error
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*SCENARIOS, _RATES]
    parser.add_argument("--only", choices=names, action="append", help="one or more of them")
    parser.add_argument(
        "--systems", choices=SYSTEMS, action="append", help="one or more, and no rates"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was seen here")
    given = parser.parse_args(arguments)
    # Celery would tell servers that are gone of results that are collected.
    sys.unraisablehook = lambda _: None
    made_with = machine.describe()
    machine.introduce(made_with)
    rows, is_right = [], True
    chosen = given.only or names
    for name, scenario in SCENARIOS.items():
        if name not in chosen:
            continue
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
    if _RATES in chosen and not given.systems:
        print("\n9. What a call costs.")
        sys.stdout.flush()
        # Its own process has met no other servers.
        is_right &= subprocess.run([sys.executable, "-m", "benchmarks.enqueue"]).returncode == 0
    if given.json:
        given.json.write_text(json.dumps({**made_with, "rows": rows}, indent=2))
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
