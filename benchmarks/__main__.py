"""Runs all benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import broker, enqueue, recovery

for benchmark in (enqueue, recovery, broker):
    print(f"== {benchmark.__name__}", flush=True)
    benchmark.main([])
