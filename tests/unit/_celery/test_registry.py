"""Looking at an app without changing it."""

from __future__ import annotations

from celery import Celery

from reliable_tasks._celery.registry import is_configured, is_finalized, known_tasks


def test_looking_changes_nothing() -> None:
    """Neither the configuration is read nor a task is made."""
    app = Celery(set_as_current=False)

    @app.task(shared=False)
    def lazy() -> None:
        pass

    assert known_tasks(app) == []
    assert not is_configured(app)
    assert not is_finalized(app)
    app.finalize()
    assert [task.name for task in known_tasks(app)] == [lazy.name]
    assert is_finalized(app)
    app.conf.get("broker_url")
    assert is_configured(app)
