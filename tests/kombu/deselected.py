"""Reads the list of kombu's tests that cannot concern ours."""

from __future__ import annotations

from pathlib import Path

__all__ = ["deselected"]


def deselected() -> dict[str, str]:
    """Return the listed tests, as pytest names them, each with the reason."""
    listed: dict[str, str] = {}
    file = ""
    for line in (Path(__file__).parent / "deselected.txt").read_text("utf-8").splitlines():
        if line.startswith("t/"):
            file = line
        elif line and not line.startswith("#"):
            name, _, reason = line.partition(": ")
            assert reason, f"no reason given: {line}"
            listed[f"{file}::{name}"] = reason
    return listed
