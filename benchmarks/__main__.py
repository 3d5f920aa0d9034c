"""Runs all benchmarks, one after the other; those of ``chaos`` are run by themselves."""

from __future__ import annotations

from benchmarks import enqueue, recovery
from benchmarks.broker import __main__ as broker

codes = []
for name, benchmark in (("enqueue", enqueue), ("recovery", recovery), ("broker", broker)):
    print(f"== {name}", flush=True)
    codes.append(benchmark.main([]))
raise SystemExit(max(codes))
