"""What ``@once`` was told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import inf
from typing import Literal, get_args

from reliable_tasks._once.keys import KeySpec
from reliable_tasks.config import nearest
from reliable_tasks.errors import ConfigError

__all__ = ["Lifetime", "OnConflict", "OnceOptions"]

#: Redis counts in milliseconds.
_SHORTEST = 0.001
#: How long a key stays taken.
Lifetime = Literal["until_executed"]
#: What a publish does when the key is taken.
OnConflict = Literal["existing", "raise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceOptions:
    """The options of one ``@once``.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    key: KeySpec = None
    lock: Lifetime = "until_executed"
    on_conflict: OnConflict = "existing"
    ttl: float | timedelta | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("lock", get_args(Lifetime)), ("on_conflict", get_args(OnConflict))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"@once({name}={value!r})" + nearest(str(value), list(allowed)))
        if self.ttl is not None and not _SHORTEST <= self.ttl_seconds(0) < inf:
            raise ConfigError(f"@once(ttl={self.ttl!r}): give seconds or a timedelta, more than 0")

    def ttl_seconds(self, default: float) -> float:
        """Return the queue allowance in seconds."""
        if self.ttl is None:
            return default
        if isinstance(self.ttl, timedelta):
            return self.ttl.total_seconds()
        if isinstance(self.ttl, bool) or not isinstance(self.ttl, (int, float)):
            raise ConfigError(f"@once(ttl={self.ttl!r}): give seconds or a timedelta, more than 0")
        return float(self.ttl)
