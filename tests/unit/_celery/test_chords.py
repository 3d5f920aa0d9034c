"""How many parts a chord has is told to somebody besides the result backend."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, chord

from reliable_tasks._celery.chords import tell_chord_sizes

Told = list[tuple[Celery, str, int]]


@pytest.fixture
def told() -> Told:
    """What was told."""
    return []


@pytest.fixture
def chord_app(app: Celery) -> Celery:
    """An app with a header and a body for chords."""

    @app.task(name="add")
    def add(a: int, b: int) -> int:
        return a + b

    @app.task(name="total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    return app


def call(app: Celery, parts: int) -> str:
    """Call a chord of so many parts; return its group."""
    add, total = app.tasks["add"], app.tasks["total"]
    result = chord([add.s(n, 1) for n in range(parts)], total.s(), app=app).apply_async()
    return str(result.parent.id)


def listen(app: Celery, told: Told) -> None:
    """Note what is told."""
    tell_chord_sizes(app, lambda *one: told.append(one))


def test_each_call_tells_its_size(chord_app: Celery, told: Told) -> None:
    """With its group; the app is the one that called it."""
    listen(chord_app, told)
    groups = [call(chord_app, 3), call(chord_app, 2)]
    assert told == [(chord_app, groups[0], 3), (chord_app, groups[1], 2)]


def test_the_backend_is_told_all_the_same(
    chord_app: Celery, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the parts; and it is told last, for then a part may already end."""
    order: list[Any] = []
    monkeypatch.setattr(
        type(chord_app.backend),
        "set_chord_size",
        lambda self, group_id, chord_size: order.append((group_id, chord_size)),
    )
    other = Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False)
    other.tasks.update(chord_app.tasks)
    tell_chord_sizes(other, lambda app, group_id, size: order.append("told"))
    other.backend.set_chord_size("g", 2)
    assert order == ["told", ("g", 2)]


@pytest.mark.parametrize("is_thread_safe", [False, True])
def test_a_backend_that_was_made_before_tells_too(
    chord_app: Celery, told: Told, is_thread_safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery keeps it per app, or per thread; each chord is told of once."""
    made = chord_app.backend
    monkeypatch.setattr(chord_app, "_backend_cache", made if is_thread_safe else None)
    chord_app._local.backend = None if is_thread_safe else made
    listen(chord_app, told)
    assert chord_app.backend is made
    group = call(chord_app, 2)
    assert told == [(chord_app, group, 2)]


def test_a_group_without_a_body_has_no_size(chord_app: Celery, told: Told) -> None:
    """Nobody waits for its parts."""
    listen(chord_app, told)
    add = chord_app.tasks["add"]
    (add.s(1, 1) | add.s(2)).apply_async()
    assert told == []
