"""The same isolation as in the unit tests."""

from tests.unit.conftest import app, own_celery

__all__ = ["app", "own_celery"]
