"""What a user set in ``app.conf``, as opposed to what Celery or this library put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery

__all__ = ["explicit", "put", "reliable_settings"]

#: What this library wrote into each app's configuration, and the value it replaced.
_ours: WeakKeyDictionary[Celery, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()
_UNSET = object()


def explicit(app: Celery, key: str) -> tuple[bool, Any]:
    """Say whether the user set ``key``, and to what.

    Args:
        app: The app; its configuration is read if it was not yet.
        key: A setting's name in lower case, e.g. ``"task_acks_late"``.

    Returns:
        Whether the user set it by any of its names (namespaced, old style), and the value:
        the user's, or else the one that Celery would use without this library.
    """
    value = app.conf.get(key)
    written, replaced = _ours.get(app, {}).get(key, (_UNSET, _UNSET))
    if written is not _UNSET and value is written:
        return (False, _celery_default(app, key)) if replaced is _UNSET else (True, replaced)
    is_set = any(name in mapping for mapping in _user_maps(app) for name in _names(app, key))
    return is_set, value


def put(app: Celery, key: str, value: Any) -> None:
    """Write a setting in this library's name: `explicit` still knows what the user had set."""
    is_set, before = explicit(app, key)
    _ours.setdefault(app, {})[key] = (value, before if is_set else _UNSET)
    app.conf[key] = value
    if app.conf.get(key) is not value:
        # Before 5.7 what the user set with a namespace hides what is written later without.
        app.conf[_names(app, key)[0]] = value


def reliable_settings(app: Celery) -> dict[str, Any]:
    """Return the user's ``reliable_*`` settings, names in lower case without a namespace."""
    found: dict[str, Any] = {}
    namespace = str(getattr(app, "namespace", None) or "").lower()
    for mapping in _user_maps(app):
        for name, value in mapping.items():
            bare = str(name).lower()
            if namespace:
                bare = bare.removeprefix(namespace.rstrip("_") + "_")
            if bare.startswith("reliable_"):
                found.setdefault(bare, value)
    return found


def _user_maps(app: Celery) -> Iterator[Mapping[str, Any]]:
    app.conf.get("broker_url")  # a first access reads a configuration that is still pending
    # The last map holds Celery's defaults.
    yield from _maps(app)[:-1]


def _celery_default(app: Celery, key: str) -> Any:
    return _maps(app)[-1].get(key)


def _maps(app: Celery) -> list[Mapping[str, Any]]:
    # A ChainMap's own attribute: explicit changes, then what was loaded, then Celery's defaults.
    return list(app.conf.maps or ())


def _names(app: Celery, key: str) -> tuple[str, ...]:
    # Celery's own list of a setting's names: with the namespace, and as it was called before 4.0.
    # Before 5.7 the old name is left to another function.
    conf: Any = app.conf
    return (*conf._to_keys(key), *(old_name(key) for old_name in conf._keys or ()))
