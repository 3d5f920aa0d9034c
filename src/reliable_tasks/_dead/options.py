"""Which tasks become dead letters, and how often they may crash before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from celery import Celery
from celery.utils.imports import symbol_by_name

from reliable_tasks._places import read_config
from reliable_tasks._store.letters import Bounds, Cause, DeadLetter
from reliable_tasks.config import ReliableConfig, check_count, nearest
from reliable_tasks.errors import ConfigError

__all__ = ["DeadLetterOption", "Options", "Redact", "bounds_of", "causes_of", "read_options"]

#: Takes what is about to be kept, and returns it without what must not be read.
Redact = Callable[[DeadLetter], DeadLetter]
#: What a ``dead_letter=`` can be.
DeadLetterOption = bool | Collection[str] | Mapping[str, bool]

#: A task that expired has not failed.
_BY_DEFAULT = frozenset(set(Cause) - {Cause.EXPIRED})
_UNSET = object()


@dataclass(frozen=True, slots=True)
class Options:
    """What a task's end is about.

    Attributes:
        max_crashes: How often it may crash, ``None`` without a bound.
        max_requeues: How often it may go back to its queue, ``None`` without a bound.
        causes: For which causes it becomes a dead letter.
        bounds: How much is kept.
        redact: What is done before it is kept, if anything.
    """

    max_crashes: int | None
    max_requeues: int | None
    causes: frozenset[Cause]
    bounds: Bounds
    redact: Redact | None


def read_options(app: Celery, task: Any = None) -> Options:
    """Return the options of a task, or of messages that are no task's.

    Raises:
        ConfigError: One of them is no good.
    """
    config = read_config(app)
    where = "" if task is None else f" of {task.name}"

    def count(name: str, of_app: int | None, least: int, what: str) -> int | None:
        value = _UNSET if task is None else getattr(task, name, _UNSET)
        if value is _UNSET:
            return of_app
        check_count(f"{name}{where}", value, least, what, is_optional=True)
        return cast("int | None", value)

    own = _UNSET if task is None else getattr(task, "dead_letter", _UNSET)
    causes = (
        causes_of("reliable_dead_letter", config.dead_letter)
        if own is _UNSET
        else causes_of(f"dead_letter{where}", own)
    )
    return Options(
        max_crashes=count("max_crashes", config.max_crashes, 1, "crashes"),
        max_requeues=count("max_requeues", config.max_requeues, 0, "requeues"),
        causes=causes,
        bounds=bounds_of(config),
        redact=_redact(config.dead_letter_redact),
    )


def bounds_of(config: ReliableConfig) -> Bounds:
    """Return how many dead letters an app keeps, for how long, and how large ones."""
    return Bounds(
        config.dead_letter_max_age, config.dead_letter_max_count, config.dead_letter_max_body
    )


def causes_of(where: str, option: Any) -> frozenset[Cause]:
    """Return the causes that an option names.

    Args:
        where: The option, for messages.
        option: Its value.

    Raises:
        ConfigError: It names one that does not exist, or is of another kind.
    """
    if isinstance(option, bool):
        return _BY_DEFAULT if option else frozenset()
    if isinstance(option, str):
        return frozenset({_cause(where, option)})
    if isinstance(option, Mapping):
        changed = {_cause(where, name): bool(kept) for name, kept in option.items()}
        return (_BY_DEFAULT | {c for c, kept in changed.items() if kept}) - {
            c for c, kept in changed.items() if not kept
        }
    if isinstance(option, Collection):
        return frozenset(_cause(where, name) for name in option)
    raise ConfigError(
        f"{where} = {option!r}: give True, False, names of causes, or a mapping of names to True "
        "and False"
    )


def _cause(where: str, name: Any) -> Cause:
    try:
        return Cause(name)
    except ValueError:
        raise ConfigError(
            f"{where} = {name!r}" + nearest(str(name), [str(cause) for cause in Cause])
        ) from None


def _redact(setting: Any) -> Redact | None:
    if setting is None or callable(setting):
        return cast("Redact | None", setting)
    try:
        found = symbol_by_name(setting)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"reliable_dead_letter_redact = {setting!r}: give a function, or its name as "
            f"'module:function' ({error})"
        ) from error
    if not callable(found):
        raise ConfigError(f"reliable_dead_letter_redact = {setting!r}: it is no function")
    return cast(Redact, found)
