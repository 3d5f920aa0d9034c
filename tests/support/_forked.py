"""What a `ForkServer` runs: it imports Celery, forks workers, and tells how they ended.

A line of standard input is a worker to start. A line of standard output is one that was started,
``{"pid": 17}``, or has ended, ``{"pid": 17, "returncode": -9}``.
"""

import ctypes
import gc
import json
import os
import selectors
import signal
import sys
from typing import Any

import celery.__main__
import celery.apps.worker
import celery.backends.redis
import celery.bin.celery
import celery.concurrency.prefork
import celery.concurrency.solo
import celery.concurrency.thread
import celery.worker.components
import celery.worker.consumer
import kombu.transport.redis  # noqa: F401

_PR_SET_PDEATHSIG = 1


def serve() -> dict[str, Any]:
    """Fork a worker for each line; return what the line said, in the worker."""
    wakes, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    for source in (0, wakes):
        selector.register(source, selectors.EVENT_READ)
    server, rest = os.getpid(), b""
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if wakes in ready:
            os.read(wakes, 4096)
            _tell_ends()
        if 0 in ready:
            got = os.read(0, 65536)
            if not got:
                sys.exit()
            *lines, rest = (rest + got).split(b"\n")
            for line in lines:
                if not os.fork():
                    _leave(server)
                    selector.close()
                    for end in (wakes, alarm):
                        os.close(end)
                    asked: dict[str, Any] = json.loads(line)
                    return asked


def _tell(**said: int) -> None:
    os.write(1, json.dumps(said).encode() + b"\n")


def _tell_ends() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _tell(pid=pid, returncode=os.waitstatus_to_exitcode(status))


def _leave(server: int) -> None:
    """Keep nothing of the server but its end, which is this one's, too."""
    refused = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if refused or os.getppid() != server:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    # Now there is a group to kill.
    _tell(pid=os.getpid())


def be_worker(command: list[str], env: dict[str, str], cwd: str, log: str) -> None:
    """Run ``celery`` as a shell in that folder would."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # As with -m.
    sys.path.insert(0, cwd)
    sys.argv = [celery.__main__.__file__, *command]
    celery.__main__.main()


if __name__ == "__main__":
    # A collection in a worker would write to, and so copy, every page of what was imported.
    gc.freeze()
    be_worker(**serve())
