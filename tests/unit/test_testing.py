"""What users test with."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from celery import Celery

from reliable_tasks import MissingExtra, ReliableTask, once
from reliable_tasks.testing import fake_redis


def test_claims_live_for_one_block() -> None:
    """Each block begins with an empty server."""
    with Celery("t", broker="memory://", set_as_current=False) as app:
        app.conf.reliable_redis_url = "redis://nowhere:1/0"

        @app.task(base=ReliableTask, shared=False)
        @once
        def t() -> None:
            pass

        with fake_redis():
            first = t.delay()
            assert t.delay().id == first.id
        with fake_redis():
            assert not t.delay().duplicate


@pytest.mark.parametrize("package", ["fakeredis", "lupa"])
def test_without_its_packages_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """The message is the command to type."""
    missing: Any = None
    monkeypatch.setitem(sys.modules, package, missing)
    with pytest.raises(MissingExtra, match=r"pip install 'reliable-tasks\[test\]'"), fake_redis():
        pass
