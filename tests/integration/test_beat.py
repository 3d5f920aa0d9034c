"""Periodic tasks: a real beat, whose calls nobody waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reliable_tasks.demo._server import EmbeddedServer, tied_to_parent
from tests.integration.apps import shop
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

_ROOT = Path(__file__).parents[2]


@contextmanager
def beat(scene: Scene, tmp_path: Path, **settings: object) -> Iterator[Path]:
    """Run ``celery beat``; give the file of what it says."""
    log = tmp_path / "beat.log"
    env = {
        **os.environ,
        "RT_BROKER_URL": str(scene.app.conf.broker_url),
        "RT_RESULT_URL": str(scene.app.conf.result_backend),
        "RT_SETTINGS": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "src")]),
    }
    command = [
        *(sys.executable, "-m", "celery", "-A", shop.__name__, "beat", "--loglevel", "DEBUG"),
        *("--schedule", str(tmp_path / "schedule"), "--pidfile", ""),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            tied_to_parent(command), env=env, cwd=_ROOT, stdout=out, stderr=out
        )
    try:
        yield log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize("task", ["strict", "act"])
def test_a_run_that_still_goes_on_is_not_called_again(
    redis_server: EmbeddedServer, scenes: StartScene, tmp_path: Path, task: str
) -> None:
    """Beat says nothing of it, whatever the conflict setting is, and calls it when it has ended."""
    scene = scenes(redis_server.url, other_database(redis_server), limit=60)
    scene.worker(concurrency=2)
    args = ["tick", "wait"] if task == "act" else ["tick"]
    entry = {"task": task, "schedule": 0.5, "args": args}
    with beat(scene, tmp_path, beat_schedule={"tick": entry}) as log:
        scene.wait_starts("tick")
        sent = "Sending due task tick"
        wait_until(lambda: log.read_text().count(sent) >= 4, 20, log.read_text)
        assert scene.starts("tick") == 1
        scene.journal.open("tick")
        scene.wait_starts("tick", 3)
        said = log.read_text()
    assert "Traceback" not in said
    assert "ERROR" not in said
