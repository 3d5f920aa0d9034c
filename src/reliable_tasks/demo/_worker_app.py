"""What a worker of the demo imports: ``celery -A reliable_tasks.demo._worker_app worker``."""

from __future__ import annotations

import os

from reliable_tasks.demo._apps import CONTENDERS
from reliable_tasks.demo._workers import BACKEND, BROKER, CONTENDER

app = CONTENDERS[os.environ[CONTENDER]](os.environ[BROKER], os.environ[BACKEND]).app
