"""The shop with a worker whose main loop can be made to hang, and which is sooner taken for hung.

``RT_HUNG`` and ``RT_HUNG_AFTER`` in the worker's environment are what the library otherwise has
as constants: after how many seconds a main loop has hung (four leases, if that is longer), and
how many seconds after its hard limit a run has.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery.worker.control import control_command

from reliable_tasks._broker import keeper
from reliable_tasks._celery import delivery
from tests.integration.apps.shop import app, build

__all__ = ["app", "build"]

if "RT_HUNG" in os.environ:
    keeper._HUNG = float(os.environ["RT_HUNG"])
if "RT_HUNG_AFTER" in os.environ:
    delivery._HUNG_AFTER = float(os.environ["RT_HUNG_AFTER"])


@control_command(args=[("seconds", float)], signature="<seconds>")
def hang(state: Any, seconds: float) -> None:
    """Do nothing else in the main loop, as a call of a user's that waits for a server would."""
    time.sleep(seconds)
