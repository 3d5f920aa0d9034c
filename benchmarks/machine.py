"""What a run was made with: said at its start, and kept beside its numbers."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

__all__ = ["describe", "introduce"]


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
