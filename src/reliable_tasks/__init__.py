"""Celery tasks that are never lost, never run twice at once, never stuck and never silent."""

from __future__ import annotations

from typing import Any

from reliable_tasks import dead_letters, presets
from reliable_tasks._once.decorator import once
from reliable_tasks._once.held import HeldClaim
from reliable_tasks._once.result import ReliableResult
from reliable_tasks._setup import (
    Change,
    Concern,
    Report,
    VisibilityTimeout,
    apply_reliable_config,
    recommended_visibility_timeout,
)
from reliable_tasks._task import ReliableTask
from reliable_tasks.config import ReliableConfig
from reliable_tasks.errors import (
    ConfigError,
    DeadLetterError,
    DeadLetterNotFound,
    DuplicateTaskError,
    FollowedTaskFailed,
    FollowTimeout,
    LockError,
    LockLost,
    MissingExtra,
    PoisonPill,
    ReliableError,
    ReliableWarning,
    ReplayRefused,
    RequeuesExhausted,
    RetriesExhausted,
    ScriptError,
    StoreError,
    StoreUnavailable,
    TaskExited,
    UnsupportedCelery,
)

__all__ = [
    "Change",
    "Concern",
    "ConfigError",
    "DeadLetterError",
    "DeadLetterNotFound",
    "DuplicateTaskError",
    "FollowTimeout",
    "FollowedTaskFailed",
    "HeldClaim",
    "LockError",
    "LockLost",
    "MissingExtra",
    "PoisonPill",
    "ReliableConfig",
    "ReliableError",
    "ReliableResult",
    "ReliableTask",
    "ReliableWarning",
    "ReplayRefused",
    "Report",
    "RequeuesExhausted",
    "RetriesExhausted",
    "ScriptError",
    "StoreError",
    "StoreUnavailable",
    "TaskExited",
    "UnsupportedCelery",
    "VisibilityTimeout",
    "apply_reliable_config",
    "dead_letters",
    "once",
    "presets",
    "recommended_visibility_timeout",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("reliable-tasks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
