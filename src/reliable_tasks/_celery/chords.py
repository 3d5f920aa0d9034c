"""How many parts a chord has: Celery tells its result backend alone, when it calls the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend

__all__ = ["counts_any_part", "tell_chord_sizes"]


#: Takes the app, the chord's group and its number of parts.
Told = Callable[[Celery, str, int], None]


def tell_chord_sizes(app: Celery, told: Told) -> None:
    """Tell somebody else, too, from now on."""
    known: Any = app
    make = known._get_backend

    def made() -> Any:
        return _telling(make(), told)

    known._get_backend = made
    for backend in (known._backend_cache, getattr(known._local, "backend", None)):
        if backend is not None:
            _telling(backend, told)


def counts_any_part(app: Celery) -> bool:
    """Say whether a chord is called when enough parts have ended, whatever their ids.

    Celery's other result backends wait for the parts that were called first.
    """
    return isinstance(app.backend, RedisBackend)


def _telling(backend: Any, told: Told) -> Any:
    tell_backend = backend.set_chord_size

    def set_chord_size(group_id: Any, chord_size: int) -> None:
        told(backend.app, str(group_id), chord_size)
        tell_backend(group_id, chord_size)

    backend.set_chord_size = set_chord_size
    return backend
