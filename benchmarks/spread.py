"""How far measured values lie apart."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

__all__ = ["interval", "percentile"]

_RESAMPLES = 2000


def interval(values: Sequence[float], draw: random.Random) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES)
    )
    edge = _RESAMPLES // 40
    return medians[edge], medians[-edge - 1]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many per cent of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
