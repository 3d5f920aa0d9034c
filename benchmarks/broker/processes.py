"""Starts what is measured in processes of their own, which end with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reliable_tasks.demo._server import tied_to_parent

__all__ = ["start", "worker"]

_ROOT = Path(__file__).resolve().parents[2]


def start(
    module: str, *arguments: object, env: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start ``python -m`` a module, from the root of the repository."""
    return subprocess.Popen(
        tied_to_parent([sys.executable, "-m", module, *map(str, arguments)]),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)]),
            **(env or {}),
        },
        cwd=_ROOT,
        **options,
    )


@contextmanager
def worker(
    url: str, kind: str, *, pool: str, concurrency: int, starts: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker that says nothing."""
    process = start(
        "celery",
        *("-A", "benchmarks.broker.app", "worker"),
        *("--pool", pool, "--concurrency", concurrency, "--loglevel", "ERROR"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        env={"RB_BROKER": url, "RB_KIND": kind, "RB_STARTS": str(starts or os.devnull)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # What is measured is over. Asked to end under load, Celery's children wait 30 s in vain
        # for their last results to be read, with either transport.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
