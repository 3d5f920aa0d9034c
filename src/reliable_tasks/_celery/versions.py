"""Which Celery is installed, and what it can do."""

from __future__ import annotations

import celery
import kombu
from packaging.version import Version

from reliable_tasks.errors import UnsupportedCelery

__all__ = ["CELERY", "HAS_SPLIT_ACK_SETTINGS", "check_versions"]

CELERY = Version(celery.__version__)
KOMBU = Version(kombu.__version__)

_OLDEST = Version("5.6.0")
_TOO_NEW = Version("5.8.dev0")
_KOMBU_OLDEST = Version("5.7.0")

#: ``task_acks_on_failure`` and ``task_acks_on_timeout`` (5.7) took the place of
#: ``task_acks_on_failure_or_timeout``.
HAS_SPLIT_ACK_SETTINGS = Version("5.7.0") <= CELERY


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
