"""What a run was made with: said at its start, and kept beside its numbers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from typing import Any

__all__ = ["describe", "introduce", "longest_stall"]


def describe(**more: Any) -> dict[str, Any]:
    """Return the versions that matter, the machine, and what else is to be known of a run."""
    return {
        "python": platform.python_version(),
        "celery": version("celery"),
        "kombu": version("kombu"),
        "redis-py": version("redis"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **more,
    }


def introduce(described: dict[str, Any]) -> None:
    """Say it, where it is not in the way of the table."""
    print(", ".join(f"{name} {value}" for name, value in described.items()), file=sys.stderr)


def longest_stall(seconds: int) -> float:
    """Return for how long (ms) a process was kept from its processor that did nothing but run.

    By ``redis-cli --intrinsic-latency``, as Redis' own guide to latency has it. No command of a
    server on this machine can be trusted to take less. 0 where there is no ``redis-cli``.
    """
    cli = shutil.which("redis-cli")
    if cli is None:
        return 0.0
    command = [cli, "--intrinsic-latency", str(seconds)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(int(found) for found in re.findall(r"Max latency so far: (\d+)", said)) / 1000
