"""What ``@once`` was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, get_args

from reliable_tasks._once.keys import KeySpec
from reliable_tasks.config import LONGEST_TTL, nearest
from reliable_tasks.errors import ConfigError

__all__ = ["Lifetime", "OnConflict", "OnceOptions"]

#: Redis counts in milliseconds.
_SHORTEST = 0.001
#: How long a key stays taken.
Lifetime = Literal[
    "until_executed",
    "until_executing",
    "until_expired",
    "while_executing",
    "until_and_while_executing",
]
#: What a call does whose key is taken, ...
AtPublish = Literal["existing", "raise", "replace"]
#: ... and what a task does whose turn to run it is not.
AtStart = Literal["reschedule", "drop", "raise"]
#: Either of them, or both by name: ``{"publish": "raise", "start": "drop"}``.
OnConflict = Literal["existing", "raise", "replace", "reschedule", "drop"] | Mapping[str, str]

_PUBLISH, _START = "publish", "start"
_ACTIONS = {_PUBLISH: get_args(AtPublish), _START: get_args(AtStart)}
#: When each lifetime can meet a conflict.
_STAGES: dict[str, tuple[str, ...]] = {
    "until_executed": (_PUBLISH,),
    "until_executing": (_PUBLISH,),
    "until_expired": (_PUBLISH,),
    "while_executing": (_START,),
    "until_and_while_executing": (_PUBLISH, _START),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceOptions:
    """The options of one ``@once``.

    Attributes:
        at_publish: What a call does whose key is taken.
        at_start: What a task does whose key another one runs with.

    Raises:
        ConfigError: A value is unknown or out of range, or makes no sense with another one.
    """

    key: KeySpec = None
    lock: Lifetime = "until_executed"
    on_conflict: OnConflict | None = None
    ttl: float | timedelta | None = None
    at_publish: AtPublish = field(init=False, default="existing")
    at_start: AtStart = field(init=False, default="reschedule")

    def __post_init__(self) -> None:
        if self.lock not in list(_STAGES):
            raise ConfigError(f"@once(lock={self.lock!r})" + nearest(str(self.lock), list(_STAGES)))
        for stage, action in self._actions().items():
            object.__setattr__(self, f"at_{stage}", action)
        if self.ttl is not None and not _SHORTEST <= self.ttl_seconds(0) <= LONGEST_TTL:
            raise ConfigError(
                f"@once(ttl={self.ttl!r}): give seconds or a timedelta, more than 0 and at most "
                "ten years"
            )
        if self.ttl is not None and not self.is_claimed_by_calls:
            raise ConfigError(
                f"@once(lock={self.lock!r}, ttl={self.ttl!r}): any number of its calls may wait in "
                "the queue, for however long; leave ttl out"
            )
        if self.is_for_a_window and self.at_publish == "replace":
            raise ConfigError(
                "@once(lock='until_expired', on_conflict='replace') would run twice in its window: "
                "a call may replace one that has run already. Use lock='until_executed'"
            )

    @property
    def is_claimed_by_calls(self) -> bool:
        """Whether a call takes the key."""
        return self.lock != "while_executing"

    @property
    def is_freed_at_start(self) -> bool:
        """Whether the key that a call took is free when its task starts."""
        return self.lock in ("until_executing", "until_and_while_executing")

    @property
    def is_for_a_window(self) -> bool:
        """Whether the key stays taken for the ``ttl`` whatever happens."""
        return self.lock == "until_expired"

    @property
    def takes_turns(self) -> bool:
        """Whether tasks with the key wait for each other when they start."""
        # One that waited for longer than its window may meet that of the next.
        return self.lock in ("while_executing", "until_and_while_executing", "until_expired")

    def ttl_seconds(self, default: float) -> float:
        """Return the queue allowance in seconds."""
        if self.ttl is None:
            return default
        if isinstance(self.ttl, timedelta):
            return self.ttl.total_seconds()
        if isinstance(self.ttl, bool) or not isinstance(self.ttl, (int, float)):
            raise ConfigError(f"@once(ttl={self.ttl!r}): give seconds or a timedelta, more than 0")
        return float(self.ttl)

    def _actions(self) -> dict[str, str]:
        stages = _STAGES[self.lock]
        given: Any = self.on_conflict
        if given is None:
            return {}
        if isinstance(given, Mapping):
            for stage, action in given.items():
                if stage not in _ACTIONS:
                    known = nearest(str(stage), list(_ACTIONS))
                    raise ConfigError(f"@once(on_conflict={given!r}): {stage!r}{known}")
                self._check(action, _ACTIONS[stage])
                if stage not in stages:
                    raise ConfigError(
                        f"@once(lock={self.lock!r}, on_conflict={given!r}): there is no conflict "
                        f"at {stage} with this lock, only at {stages[0]}"
                    )
            return dict(given)
        self._check(given, tuple(dict.fromkeys(sum(_ACTIONS.values(), ()))))
        fitting = [stage for stage in stages if given in _ACTIONS[stage]]
        if not fitting:
            raise ConfigError(
                f"@once(lock={self.lock!r}, on_conflict={given!r}): its conflicts are met at "
                f"{stages[0]}, where there is {', '.join(_ACTIONS[stages[0]])}"
            )
        if len(fitting) > 1:
            raise ConfigError(
                f"@once(lock={self.lock!r}, on_conflict={given!r}): say when, for example "
                f"on_conflict={{'publish': {given!r}}}"
            )
        return {fitting[0]: given}

    def _check(self, action: Any, known: tuple[str, ...]) -> None:
        if action not in known:
            raise ConfigError(
                f"@once(on_conflict={self.on_conflict!r})" + nearest(str(action), list(known))
            )
