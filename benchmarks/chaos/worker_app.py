"""What ``celery -A`` is pointed at; the environment says which system."""

from __future__ import annotations

import json
import os

from benchmarks.chaos.app import SETTINGS, SYSTEM, make_app

app = make_app(os.environ[SYSTEM], os.environ["RT_BROKER_URL"], json.loads(os.environ[SETTINGS]))
