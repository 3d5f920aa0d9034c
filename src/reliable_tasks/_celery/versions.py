"""Which Celery and kombu this release works with."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from reliable_tasks.errors import UnsupportedCelery

__all__ = ["CLEARS_TIMERS", "ENDS_EXITS_AND_REJECTS", "check_versions"]

CELERY = Version(metadata.version("celery"))
KOMBU = Version(metadata.version("kombu"))

_TOO_NEW = Version("5.8.dev0")
_OLDEST_CELERY = Version("5.6.0")
_OLDEST_KOMBU = Version("5.7.0")

#: Since 5.7.0 a child that ends by SystemExit counts as lost, and a task that rejects its
#: message for good as failed. Before, the one was acknowledged and both stayed STARTED for ever.
ENDS_EXITS_AND_REJECTS = Version("5.7.0") <= CELERY

#: Before 5.7.0 a worker that loses its connection clears every timer that it has.
CLEARS_TIMERS = Version("5.7.0") > CELERY


def check_versions() -> None:
    """Refuse versions whose private parts this release was not tested with.

    Raises:
        UnsupportedCelery: With the versions found and those that work.
    """
    if not (_OLDEST_CELERY <= CELERY < _TOO_NEW and _OLDEST_KOMBU <= KOMBU < _TOO_NEW):
        raise UnsupportedCelery(
            f"Celery {CELERY} with kombu {KOMBU} is not supported: "
            "install 'celery>=5.6,<5.8' and 'kombu>=5.7,<5.8'"
        )
