"""Which Celery and kombu this release works with."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from reliable_tasks.errors import UnsupportedCelery

__all__ = ["check_versions"]

CELERY = Version(metadata.version("celery"))
KOMBU = Version(metadata.version("kombu"))

_OLDEST = Version("5.6.0")
_TOO_NEW = Version("5.8.dev0")
_KOMBU_OLDEST = Version("5.7.0")


def check_versions() -> None:
    """Refuse versions whose private parts this release was not tested with.

    Raises:
        UnsupportedCelery: With the versions found and those that work.
    """
    if not (_OLDEST <= CELERY < _TOO_NEW and _KOMBU_OLDEST <= KOMBU < _TOO_NEW):
        raise UnsupportedCelery(
            f"Celery {CELERY} with kombu {KOMBU} is not supported: "
            "install 'celery>=5.6,<5.8' and 'kombu>=5.7,<5.8'"
        )
