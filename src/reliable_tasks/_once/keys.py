"""From a call to the name of its claim."""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reliable_tasks._once.encoding import digest
from reliable_tasks.errors import ConfigError

__all__ = ["Key", "KeySpec"]

#: What `@once(key=...)` takes.
KeySpec = str | Callable[..., Any] | None

_LABEL_CHARACTERS = 48
_NAME_CHARACTERS = 64
_FIRST_NAME = re.compile(r"[^.\[]+")
_STEP = re.compile(r"\.([^.\[]+)|\[([^\]]+)\]")
_PATH = re.compile(rf"{_FIRST_NAME.pattern}(?:{_STEP.pattern})*")


@dataclass(frozen=True, slots=True)
class _Field:
    """One ``{...}`` of a template."""

    path: str
    conversion: str | None
    format_spec: str


class Key:
    """Names the claim of each call of one task.

    Args:
        spec: A template over the task's parameters, a function of them, or ``None`` for all.
        signature: The task's signature, without ``self``.
        task: The task's name, for messages.

    Raises:
        ConfigError: The template is no template, names what is no parameter, or would run code.
    """

    def __init__(self, spec: KeySpec, signature: inspect.Signature, task: str) -> None:
        self._spec = spec
        self._signature = signature
        self._fields: list[_Field] = []
        if isinstance(spec, str):
            self._fields = _parse(spec, signature, task)
        elif spec is not None and not callable(spec):
            raise ConfigError(
                f"@once(key={spec!r}) on {task}: give a template string, a function, or nothing"
            )

    def name(self, task: str, args: Any, kwargs: Mapping[str, Any]) -> str:
        """Return the claim's name for a call: readable in front, a digest behind.

        Args:
            task: The task's name.
            args: The call's positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            At most 150 bytes. Spellings of one call (positional, by keyword, a default written
            out) have one name.

        Raises:
            TypeError: The arguments do not fit the task, or have no stable value.
        """
        bound = self._signature.bind(*(args or ()), **(kwargs or {}))
        bound.apply_defaults()
        label = ""
        if isinstance(self._spec, str):
            values = [_value(field, bound.arguments) for field in self._fields]
            label = _render(self._spec, self._fields, values)
            identity = digest(task, "template", self._spec, values)
        elif self._spec is not None:
            value = self._spec(*bound.args, **bound.kwargs)
            label = value if isinstance(value, str) else ""
            identity = digest(task, "function", value)
        else:
            identity = digest(task, "all", bound.arguments)
        readable = _plain(task, _NAME_CHARACTERS)
        if label:
            readable += ":" + _plain(label, _LABEL_CHARACTERS)
        return f"{readable}:{identity}"


def _parse(template: str, signature: inspect.Signature, task: str) -> list[_Field]:
    where = f"@once(key={template!r}) on {task}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{where}: not a template: {error}") from None
    fields = []
    for _, path, format_spec, conversion in parsed:
        if path is None:
            continue
        if "{" in (format_spec or ""):
            raise ConfigError(f"{where}: a format must be written out, not computed")
        if conversion not in (None, "s", "r", "a"):
            raise ConfigError(f"{where}: there is no conversion {conversion!r}; use !s, !r or !a")
        _check_path(path, signature, where)
        fields.append(_Field(path, conversion, format_spec or ""))
    if not fields and signature.parameters:
        raise ConfigError(
            f"{where}: names no parameter, so every call would have one key; "
            f"known are {', '.join(signature.parameters)} "
            "(for one key on purpose: key=lambda *args, **kwargs: 'all')"
        )
    return fields


def _check_path(path: str, signature: inspect.Signature, where: str) -> None:
    first = _FIRST_NAME.match(path)
    name = first.group() if first else ""
    if name not in signature.parameters:
        raise ConfigError(
            f"{where}: {name!r} is no parameter of the task; "
            f"known are {', '.join(signature.parameters) or 'none'}"
        )
    if not _PATH.fullmatch(path):
        raise ConfigError(
            f"{where}: {path!r} is no path; write {name}.attribute, {name}[item] or both"
        )
    for is_attribute, part in _steps(path):
        if is_attribute and part.startswith("_"):
            raise ConfigError(f"{where}: {part!r} is private; use a public attribute")


def _steps(path: str) -> list[tuple[bool, str]]:
    """Split ``a.b[c]`` behind its first name, into attributes and items."""
    return [(bool(attribute), attribute or item) for attribute, item in _STEP.findall(path)]


def _value(field: _Field, arguments: Mapping[str, Any]) -> Any:
    first = _FIRST_NAME.match(field.path)
    assert first is not None
    value = arguments[first.group()]
    for is_attribute, part in _steps(field.path):
        # What was a model at the caller is a mapping in the message.
        if is_attribute and not isinstance(value, Mapping):
            value = getattr(value, part)
        elif part.isdigit() and not isinstance(value, Mapping):
            value = value[int(part)]
        else:
            value = value[int(part) if part.isdigit() and int(part) in value else part]
    if field.conversion or field.format_spec:
        # Whoever formats a value asks for its text: {x!s} makes 1 and "1" one key.
        converted = string.Formatter().convert_field(value, field.conversion)
        return format(converted, field.format_spec)
    return value


def _render(template: str, fields: list[_Field], values: list[Any]) -> str:
    rendered = iter(values)
    return "".join(
        literal + (str(next(rendered)) if path is not None else "")
        for literal, path, _, _ in string.Formatter().parse(template)
    )


def _plain(text: str, limit: int) -> str:
    """Make text fit for a key: short, printable, without what Redis or a shell reads into."""
    return re.sub(r"[^A-Za-z0-9_.:@/+=-]", "_", text[:limit])
