"""``python -m benchmarks.broker``: what the transport costs beside stock kombu.

The contenders take turns, in an order that the seed draws, and are compared round by round; an
interval is a bootstrap over the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import machine
from benchmarks.broker import consumption, dead, idle, keeper, latency

MEASUREMENTS: dict[str, ModuleType] = {
    "consumption": consumption,
    "latency": latency,
    "idle": idle,
    "keeper": keeper,
    "dead": dead,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print, and keep JSON where asked to; return 1 if a goal was missed."""
    given = _parse(arguments)
    made_with = machine.describe(seed=given.seed)
    machine.introduce(made_with)
    kept: dict[str, Any] = {}
    missed: list[str] = []
    for name in [given.only] if given.only else MEASUREMENTS:
        # A measurement draws the same alone as among the others.
        draw = random.Random(f"{name} {given.seed}")
        for result in MEASUREMENTS[name].measure(given, draw):
            print(f"{result.name}: {result.summary}", flush=True)
            kept[result.name] = {
                "summary": result.summary,
                "numbers": result.numbers,
                "missed": result.missed,
            }
            missed += result.missed
    if given.json:
        given.json.write_text(json.dumps({**made_with, "results": kept}, indent=2) + "\n")
    for what in missed:
        print(f"BROKEN: {what}")
    return 1 if missed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="what is drawn (default: 1)")
    parser.add_argument("--only", choices=MEASUREMENTS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers here")
    for name, measurement in MEASUREMENTS.items():
        measurement.add_arguments(parser.add_argument_group(name, measurement.__doc__))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
