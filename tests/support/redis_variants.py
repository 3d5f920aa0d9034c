"""Redis by TLS, and a master with a replica and Sentinels beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer, free_port, tied_to_parent
from tests.support.wait import wait_until

__all__ = ["Certificates", "SentinelGroup", "needs", "tls_server"]


def needs(program: str) -> str:
    """Return the path of a program; without it the test is skipped, but never in CI."""
    found = shutil.which(program)
    if found is None:
        message = f"{program} is not installed"
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run these tests, and {message}")
        pytest.skip(message)
    return found


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate authority and the certificate of a server on loopback, as files.

    Attributes:
        directory: Where they are: ``ca.crt``, ``redis.crt`` and ``redis.key``.
    """

    directory: Path

    @property
    def authority(self) -> str:
        """The certificate that the server's is checked with."""
        return str(self.directory / "ca.crt")

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        """Make them with openssl."""
        openssl = needs("openssl")

        def run(*arguments: str) -> None:
            subprocess.run([openssl, *arguments], cwd=directory, check=True, capture_output=True)

        (directory / "names").write_text("subjectAltName = IP:127.0.0.1\n")
        new = ("-newkey", "rsa:2048", "-nodes")
        authority = ("-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt")
        run("req", "-x509", *new, "-days", "2", *authority)
        run("req", *new, "-subj", "/CN=redis", "-keyout", "redis.key", "-out", "redis.csr")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        run("x509", "-req", "-in", "redis.csr", *signed, "-extfile", "names", "-out", "redis.crt")
        return cls(directory)


@contextmanager
def tls_server(certificates: Certificates) -> Iterator[str]:
    """Start a server that speaks TLS and yield the URL of its database 0."""
    port = free_port()
    directory = certificates.directory
    args = [
        *("--tls-port", str(port)),
        *("--tls-cert-file", str(directory / "redis.crt")),
        *("--tls-key-file", str(directory / "redis.key")),
        *("--tls-ca-cert-file", certificates.authority),
        *("--tls-auth-clients", "no"),
    ]
    # The embedded server is built without TLS.
    with EmbeddedServer(binary=needs("redis-server"), args=args):
        yield f"rediss://127.0.0.1:{port}/0"


class SentinelGroup:
    """A master, a replica and Sentinels that watch them; the master is called ``shop``.

    Args:
        directory: Where the Sentinels keep their configuration.
        sentinels: How many; one alone decides.
    """

    name = "shop"

    def __init__(self, directory: Path, *, sentinels: int = 1) -> None:
        self._directory = directory
        self._count = sentinels
        self._stack = ExitStack()
        self._servers: list[EmbeddedServer] = []
        self._sentinel: redis.Redis
        self.ports: list[int] = []

    def url(self, db: int = 0) -> str:
        """The URL of a database of the master, by all Sentinels."""
        return ";".join(f"sentinel://127.0.0.1:{port}/{db}" for port in self.ports)

    @property
    def master(self) -> EmbeddedServer:
        """The server that the Sentinels take for the master."""
        address: Any = self._sentinel.sentinel_get_master_addr_by_name(self.name)
        return next(server for server in self._servers if address and server.port == address[1])

    @property
    def replica(self) -> EmbeddedServer:
        """The other server."""
        master = self.master
        return next(server for server in self._servers if server is not master)

    def failover(self) -> None:
        """Let the replica become the master, in good order."""
        before = self.master
        wait_until(self._begin_failover, 20)
        self._wait_for_another(before)

    def kill_master(self) -> EmbeddedServer:
        """Kill the master and wait until the replica has taken over; return the dead one."""
        dead = self.master
        dead.kill()
        self._wait_for_another(dead)
        return dead

    def wait_replica(self) -> None:
        """Wait until the master has a replica that follows it."""
        wait_until(self._has_replica, 30, "a replica follows the master")

    def __enter__(self) -> Self:
        binary = needs("redis-server")
        with ExitStack() as stack:
            master = stack.enter_context(EmbeddedServer(binary=binary))
            follows = ["--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0"]
            replica = stack.enter_context(EmbeddedServer(binary=binary, args=follows))
            self._servers = [master, replica]
            for number in range(self._count):
                self.ports.append(self._start_sentinel(stack, number, binary, master.port))
            self._sentinel = redis.Redis(port=self.ports[0], decode_responses=True)
            stack.callback(self._sentinel.close)
            self._stack = stack.pop_all()
        try:
            self.wait_replica()
            wait_until(lambda: self._sentinel.sentinel_slaves(self.name), 30)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _start_sentinel(self, stack: ExitStack, number: int, binary: str, watched: int) -> int:
        port = free_port()
        config = self._directory / f"sentinel-{number}.conf"
        config.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {self._directory}\n"
            f"sentinel monitor {self.name} 127.0.0.1 {watched} 1\n"
            f"sentinel down-after-milliseconds {self.name} 1000\n"
            f"sentinel failover-timeout {self.name} 5000\n"
        )
        with (self._directory / f"sentinel-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                tied_to_parent([binary, str(config), "--sentinel"]), stdout=log, stderr=log
            )
        stack.callback(process.wait)
        stack.callback(process.kill)

        def answers() -> bool:
            try:
                with redis.Redis(port=port) as client:
                    return bool(client.sentinel_masters())
            except redis.ConnectionError:
                return False

        wait_until(answers)
        return port

    def _begin_failover(self) -> bool:
        # Until it knows the replica well, a Sentinel answers NOGOODSLAVE.
        try:
            return bool(self._sentinel.sentinel_failover(self.name))
        except redis.ResponseError:
            return False

    def _wait_for_another(self, before: EmbeddedServer) -> None:
        wait_until(lambda: self.master is not before, 30, "another master")
        wait_until(lambda: self._role(self.master) == "master", 30, "it takes writes")

    def _has_replica(self) -> bool:
        with redis.Redis(port=self.master.port) as client:
            known = client.info("replication")
        return any(
            isinstance(value, dict) and value.get("state") == "online" for value in known.values()
        )

    def _role(self, server: EmbeddedServer) -> str:
        with redis.Redis(port=server.port) as client:
            return str(client.info("replication")["role"])
