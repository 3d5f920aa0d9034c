"""Versions that were not tested are refused."""

from __future__ import annotations

import pytest
from packaging.version import Version

from reliable_tasks import UnsupportedCelery
from reliable_tasks._celery import versions


@pytest.mark.parametrize(
    ("celery", "kombu"),
    [("5.5.3", "5.7.0"), ("5.8.0", "5.7.0"), ("5.8.0.dev0", "5.7.0"), ("5.7.0", "5.6.2")],
)
def test_other_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, celery: str, kombu: str
) -> None:
    """The message has what was found and what to install."""
    monkeypatch.setattr(versions, "CELERY", Version(celery))
    monkeypatch.setattr(versions, "KOMBU", Version(kombu))
    with pytest.raises(UnsupportedCelery, match=rf"Celery {celery} with kombu {kombu}.*install"):
        versions.check_versions()


@pytest.mark.parametrize("celery", ["5.6.0", "5.6.3", "5.7.0", "5.7.9"])
def test_tested_versions_are_taken(monkeypatch: pytest.MonkeyPatch, celery: str) -> None:
    """Nothing happens."""
    monkeypatch.setattr(versions, "CELERY", Version(celery))
    monkeypatch.setattr(versions, "KOMBU", Version("5.7.1"))
    versions.check_versions()
