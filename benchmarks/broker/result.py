"""What a measurement hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        name: What was measured.
        summary: In a few words.
        numbers: The single numbers; for the JSON.
        missed: Goals that were not reached.
    """

    name: str
    summary: str
    numbers: Any
    missed: list[str] = field(default_factory=list)
