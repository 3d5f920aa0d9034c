"""What ``celery -A`` is pointed at; the environment says which system."""

from __future__ import annotations

import os

from benchmarks.chaos.app import LEASE, SYSTEM, make_app

app = make_app(
    os.environ[SYSTEM], os.environ["RT_BROKER_URL"], float(os.environ.get(LEASE) or 0) or None
)
