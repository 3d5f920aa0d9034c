"""The harness itself: what it starts stops, and what it breaks breaks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from reliable_tasks.demo._server import EmbeddedServer, free_port
from tests.support import Monitor, Proxy, is_alive, wait_until


def connect(port: int, timeout: float = 0.3) -> redis.Redis:
    """Make a client that shows every fault instead of trying again."""
    return redis.Redis(port=port, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def test_a_server_starts_and_leaves_nothing_behind() -> None:
    """A stopped server has no process, no port and no directory left."""
    with EmbeddedServer() as server:
        home = server.socket_path.parent
        pid = server.pid
        with connect(server.port) as client:
            assert client.info("server")["process_id"] == pid
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
    assert not server.running
    assert not home.exists()
    assert not is_alive(pid)


def test_a_killed_server_comes_back_where_it_was() -> None:
    """After SIGKILL a server starts again on its port, with what it had on disk."""
    with EmbeddedServer(args=["--appendonly", "yes", "--appendfsync", "always"]) as server:
        port = server.port
        with connect(port) as client:
            client.set("kept", "yes")
        server.kill()
        with connect(port) as client, pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert server.port == port
        with connect(port) as client:
            assert client.get("kept") == b"yes"


def test_a_restarted_server_is_another_process() -> None:
    """A restart ends the old process and keeps the port."""
    with EmbeddedServer() as server:
        before = (server.pid, server.port)
        server.restart()
        assert server.pid != before[0]
        assert server.port == before[1]


def test_a_server_that_cannot_start_says_why() -> None:
    """A port that is taken is named with the server's own words."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        server = EmbeddedServer(port=taken.getsockname()[1])
        with pytest.raises(RuntimeError, match="in use"):
            server.start()


def test_a_forked_child_does_not_stop_its_parents_server(redis_server: EmbeddedServer) -> None:
    """Only the process that started a server stops it."""
    code = (
        "import os\n"
        "from reliable_tasks.demo._server import EmbeddedServer\n"
        "with EmbeddedServer() as server:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        server.stop()\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    assert server.running\n"
        "    assert server.socket_path.exists()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties them on Linux alone")
def test_a_server_does_not_outlive_a_killed_parent() -> None:
    """A parent that dies by SIGKILL takes its server along."""
    code = (
        "import os, signal\n"
        "from reliable_tasks.demo._server import EmbeddedServer\n"
        "server = EmbeddedServer()\n"
        "server.start()\n"
        "print(server.pid, server.socket_path.parent, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=30)
    pid, home = done.stdout.decode().split()
    wait_until(lambda: not is_alive(int(pid)), message=f"server {pid} gone")
    # Nobody was left to remove it.
    shutil.rmtree(home)


def test_what_belongs_together_is_run_by_one_process(tmp_path: Path) -> None:
    """The mark is heard: else each process would start the workers and servers of each module."""
    tests = tmp_path / "test_group.py"
    tests.write_text(
        "import os, pathlib, pytest\n"
        "@pytest.mark.xdist_group('together')\n"
        "@pytest.mark.parametrize('n', range(8))\n"
        "def test_one(n):\n"
        "    name = os.environ['PYTEST_XDIST_WORKER']\n"
        "    pathlib.Path(__file__).with_name(f'{name}.ran').touch()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "--dist", "loadgroup"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    subprocess.run([*command, "--rootdir", ".", tests.name], cwd=tmp_path, env=env, check=True)
    assert len([*tmp_path.glob("*.ran")]) == 1


def test_wait_until_returns_what_it_waited_for() -> None:
    """The first truthy value comes back."""
    values = iter([0, None, "here"])
    assert wait_until(lambda: next(values)) == "here"


def test_wait_until_says_what_did_not_happen() -> None:
    """A wait that fails names what it waited for, and for how long."""
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the bus"):
        wait_until(lambda: False, 0.05, "the bus")


def test_a_healthy_proxy_passes_everything(redis_proxy: Proxy) -> None:
    """Without a fault a proxy is not noticed, however large the data."""
    with connect(redis_proxy.port, timeout=5) as client:
        client.set("big", b"x" * 3_000_000)
        assert client.strlen("big") == len(client.get("big") or b"") == 3_000_000


def test_a_cut_connection_fails_and_the_next_works(redis_proxy: Proxy) -> None:
    """A cut resets what is open and lets new connections in."""
    with socket.create_connection(("127.0.0.1", redis_proxy.port), timeout=5) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(64) == b"+PONG\r\n"
        assert redis_proxy.connections == 1
        redis_proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(64)
    with connect(redis_proxy.port) as client:
        assert client.ping()


def test_a_refusing_proxy_is_a_dead_server_until_healed(redis_proxy: Proxy) -> None:
    """Refused connections are refused at once, and accepted again after healing."""
    redis_proxy.refuse()
    with connect(redis_proxy.port) as client:
        with pytest.raises(redis.ConnectionError, match="refused"):
            client.ping()
        redis_proxy.heal()
        assert client.ping()


def test_a_black_hole_answers_nothing(redis_proxy: Proxy) -> None:
    """A black hole lets a client wait until its own timeout."""
    redis_proxy.black_hole()
    with connect(redis_proxy.port) as client:
        with pytest.raises(redis.TimeoutError):
            client.ping()
        redis_proxy.heal()
        assert client.ping()


def test_a_slow_proxy_delays(redis_proxy: Proxy) -> None:
    """Latency is added on the way there and on the way back."""
    with connect(redis_proxy.port, timeout=5) as client:
        client.ping()
        redis_proxy.latency = 0.05
        before = time.monotonic()
        client.ping()
        assert time.monotonic() - before >= 0.1


def test_a_lost_reply_is_that_of_a_command_that_ran(
    redis_proxy: Proxy, redis_client: redis.Redis
) -> None:
    """The server carried out the command whose answer the client never got, and only that."""
    redis_proxy.lose_replies(b"INCR")
    with connect(redis_proxy.port, timeout=5) as client:
        client.set("other", 1)
        with pytest.raises(redis.ConnectionError):
            client.incr("n")
        assert client.incr("n") == 2
    assert redis_client.get("n") == "2"


def test_a_proxy_outlives_a_server_that_resets_its_connections() -> None:
    """It goes on to take connections, whenever in their making they are lost."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(300):
                taken, _ = server.accept()
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                taken.close()
            taken, _ = server.accept()
            with taken:
                taken.sendall(b"at last")

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        with Proxy(server.getsockname()[1]) as proxy:
            for _ in range(300):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as lost,
                ):
                    lost.sendall(b"anybody?")
                    lost.recv(1)
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as kept:
                assert kept.recv(100) == b"at last"
        serving.join(timeout=5)


def test_a_monitor_lists_what_clients_sent(redis_url: str, redis_client: redis.Redis) -> None:
    """A monitor shows each command once, and none of its own."""
    redis_client.ping()
    with Monitor(redis_url) as monitor:
        redis_client.set("a", "two words")
        redis_client.get("a")
    assert monitor.names() == ["SET", "GET"]
    assert monitor.commands[0].text == "SET a two words"


def test_a_monitor_leaves_out_what_scripts_call(redis_url: str, redis_client: redis.Redis) -> None:
    """A script is one command, whatever it calls on the server."""
    redis_client.ping()
    with Monitor(redis_url) as monitor:
        redis_client.eval("redis.call('SET', KEYS[1], 1) return redis.call('GET', KEYS[1])", 1, "a")
    assert monitor.names() == ["EVAL"]
