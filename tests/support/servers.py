"""A RabbitMQ of one's own, from an installation that the system brought."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.parse
import urllib.request
import uuid
from base64 import b64encode
from pathlib import Path
from typing import Any, Self

from reliable_tasks.demo._server import free_port, tied_to_parent
from tests.support.wait import wait_until

_READY_TIMEOUT = 90.0
_STOP_TIMEOUT = 20.0


class RabbitMQServer:
    """A private RabbitMQ node: its own ports, directories, cookie and port mapper.

    It is run by the script inside the installation. The one on the path changes to another
    user first, and a node by the usual name could meet a system's own.

    Raises:
        FileNotFoundError: If RabbitMQ is not installed.
    """

    def __init__(self) -> None:
        self._script = find_rabbitmq()
        self._home: Path | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        self._node_name = f"rt-{uuid.uuid4().hex[:8]}@localhost"
        self.port = free_port()
        self._management_port = free_port()
        self._distribution_port = free_port()
        self._epmd_port = free_port()

    def url(self, vhost: str = "/") -> str:
        """The AMQP URL of a virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{urllib.parse.quote(vhost, safe='')}"

    @property
    def pid(self) -> int:
        """The process id of the node."""
        if self._node is None:
            raise RuntimeError("RabbitMQ is not running")
        return self._node.pid

    @property
    def log(self) -> str:
        """What the node has written."""
        if self._home is None:
            return ""
        return (self._home / "node.log").read_text(errors="replace")

    def start(self) -> None:
        """Start the node and wait until it takes connections."""
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix="reliable-tasks-rabbitmq-"))
            self._write_config(self._home)
        environment = self._environment(self._home)
        if self._epmd is None:
            # Started here, because the one that a node starts by itself outlives it.
            self._epmd = subprocess.Popen(
                tied_to_parent(["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        with (self._home / "node.log").open("ab") as log:
            self._node = subprocess.Popen(
                tied_to_parent([str(self._script)]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(
            self._ready, _READY_TIMEOUT, lambda: f"RabbitMQ ready; its log:\n{self.log[-4000:]}"
        )

    def stop(self) -> None:
        """Stop the node and its port mapper, and remove what they kept."""
        # Nothing to save: what the node kept goes with it, and an orderly end takes seconds.
        self._end_node(signal.SIGKILL)
        if self._epmd is not None:
            self._epmd.terminate()
            self._epmd.wait()
            self._epmd = None
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def kill(self) -> None:
        """End the node with SIGKILL and keep its data for the next `start`."""
        self._end_node(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the node in an orderly way and start it again on its data."""
        self._end_node(signal.SIGTERM)
        self.start()

    def create_vhost(self) -> str:
        """Make an empty virtual host and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.request("PUT", f"vhosts/{name}")
        return name

    def delete_vhost(self, name: str) -> None:
        """Remove a virtual host with its queues and connections."""
        self.request("DELETE", f"vhosts/{name}")

    def queues(self, vhost: str) -> list[dict[str, Any]]:
        """List a virtual host's queues as the management API describes them."""
        listed = self.request("GET", f"queues/{urllib.parse.quote(vhost, safe='')}")
        return list(listed)

    def request(self, method: str, path: str, content: Any = None) -> Any:
        """Call the management API, e.g. ``request("GET", "connections")``."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._management_port}/api/{path}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={
                "Authorization": "Basic " + b64encode(b"guest:guest").decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 -- as above
            body = response.read()
        return json.loads(body) if body else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _ready(self) -> bool:
        if self._node is None or self._node.poll() is not None:
            raise AssertionError(f"RabbitMQ ended at start:\n{self.log[-4000:]}")
        try:
            status = self.request("GET", "health/checks/port-listener/" + str(self.port))
        except OSError:
            return False
        return bool(status["status"] == "ok")

    def _end_node(self, how: signal.Signals) -> None:
        if self._node is None:
            return
        self._node.send_signal(how)
        try:
            self._node.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._node.kill()
            self._node.wait()
        self._node = None

    def _write_config(self, home: Path) -> None:
        (home / "enabled_plugins").write_text("[rabbitmq_management].\n")
        (home / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self._management_port}\n"
            "disk_free_limit.absolute = 50MB\n"
            "log.console = true\n"
            "log.console.level = info\n"
            "log.file = false\n"
        )

    def _environment(self, home: Path) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")
        }
        return {
            **inherited,
            # Erlang keeps its cookie there, and refuses one that others can read.
            "HOME": str(home),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": self._node_name,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(home / "none"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "generated"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_PID_FILE": str(home / "node.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # Makes the script become the node instead of keeping it as a child, so that the
            # process we hold is the one to signal.
            "detached": "yes",
        }


def find_rabbitmq() -> Path:
    """Return the start script inside the newest RabbitMQ installation.

    Raises:
        FileNotFoundError: If there is none, or Erlang's port mapper is missing.
    """
    scripts = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    if not scripts or not shutil.which("epmd"):
        raise FileNotFoundError("RabbitMQ is not installed: apt-get install rabbitmq-server")
    return scripts[-1]
