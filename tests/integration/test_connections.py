"""Every way to reach a Redis that Celery knows: the claims are reached the same way."""

from __future__ import annotations

import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from reliable_tasks.demo._server import EmbeddedServer, free_port, tied_to_parent
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until
from tests.support.redis_variants import needs


def _works(scene: Scene) -> None:
    """Check a claim's life: taken, joined, held and freed by a worker, retried, freed again."""
    scene.worker()
    name = uuid4().hex[:8]
    first = scene.call("act", name, "wait")
    scene.wait_starts(name)
    assert scene.claim(name)["holder"]
    assert scene.call("act", name).id == first.id
    scene.journal.open(name)
    assert first.get(timeout=10) == name
    scene.wait_free(name)
    assert scene.call("flaky", name, 1).get(timeout=10) == 1
    scene.wait_free(name, 1, task="flaky")
    scene.stop_workers()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A certificate authority and a server's certificate that it signed."""
    openssl = needs("openssl")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "names").write_text("subjectAltName = IP:127.0.0.1\n")
    new = ("-newkey", "rsa:2048", "-nodes")
    run(
        "req", "-x509", *new, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt"
    )
    run("req", *new, "-subj", "/CN=redis", "-keyout", "redis.key", "-out", "redis.csr")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    run("x509", "-req", "-in", "redis.csr", *signed, "-extfile", "names", "-out", "redis.crt")
    return tmp_path


@contextmanager
def _tls_server(certificates: Path) -> Iterator[int]:
    port = free_port()
    args = [
        *("--tls-port", str(port)),
        *("--tls-cert-file", str(certificates / "redis.crt")),
        *("--tls-key-file", str(certificates / "redis.key")),
        *("--tls-ca-cert-file", str(certificates / "ca.crt")),
        *("--tls-auth-clients", "no"),
    ]
    # The embedded server is built without TLS.
    with EmbeddedServer(binary=needs("redis-server"), args=args):
        yield port


def test_tls(scenes: StartScene, certificates: Path) -> None:
    """rediss:// with a certificate that is checked, as broker_use_ssl says."""
    checked = {"ssl_cert_reqs": "required", "ssl_ca_certs": str(certificates / "ca.crt")}
    with _tls_server(certificates) as port:
        scene = scenes(
            f"rediss://127.0.0.1:{port}/0",
            f"rediss://127.0.0.1:{port}/1",
            settings={"broker_use_ssl": checked, "redis_backend_use_ssl": checked},
        )
        _works(scene)


def test_tls_for_the_claims_alone(
    scenes: StartScene, certificates: Path, redis_server: EmbeddedServer
) -> None:
    """A lock Redis by TLS beside a broker without; its certificate's rules stand in the URL."""
    with _tls_server(certificates) as port:
        query = urllib.parse.urlencode(
            {"ssl_cert_reqs": "CERT_REQUIRED", "ssl_ca_certs": certificates / "ca.crt"}
        )
        url = f"rediss://127.0.0.1:{port}/0?{query}"
        results = other_database(redis_server)
        _works(scenes(redis_server.url, results, settings={"reliable_redis_url": url}))


def test_a_certificate_of_a_stranger_is_refused(
    scenes: StartScene, certificates: Path, redis_server: EmbeddedServer
) -> None:
    """Without the authority that signed it no claim is taken: TLS is checked by default."""
    with _tls_server(certificates) as port:
        settings = {"reliable_redis_url": f"rediss://127.0.0.1:{port}/0"}
        scene = scenes(redis_server.url, None, settings=settings)
        with pytest.raises(redis.ConnectionError, match="certificate") as caught:
            scene.claims.client.redis.ping()
        assert "verify failed" in str(caught.value)


@contextmanager
def _sentinel(directory: Path, master: EmbeddedServer) -> Iterator[int]:
    port = free_port()
    config = directory / "sentinel.conf"
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {directory}\n"
        f"sentinel monitor shop 127.0.0.1 {master.port} 1\n"
    )
    command = [needs("redis-server"), str(config), "--sentinel"]
    with (directory / "sentinel.log").open("wb") as log:
        process = subprocess.Popen(tied_to_parent(command), stdout=log, stderr=log)
    try:
        with redis.Redis(port=port) as client:
            wait_until(lambda: _masters(client))
        yield port
    finally:
        process.kill()
        process.wait()


def _masters(client: redis.Redis) -> bool:
    try:
        return bool(client.sentinel_masters())
    except redis.ConnectionError:
        return False


def test_sentinel(scenes: StartScene, tmp_path: Path) -> None:
    """sentinel:// with the master's name where Celery wants it."""
    master = EmbeddedServer(binary=needs("redis-server"))
    with master, _sentinel(tmp_path, master) as port:
        scene = scenes(
            f"sentinel://127.0.0.1:{port}/0",
            f"sentinel://127.0.0.1:{port}/1",
            settings={"broker_transport_options": {"master_name": "shop"}},
        )
        _works(scene)


def test_unix_socket(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """redis+socket:// for broker, claims and results."""
    url = f"redis+socket://{redis_server.socket_path}?virtual_host="
    _works(scenes(f"{url}0", f"{url}1"))


def test_user_with_an_odd_password(scenes: StartScene) -> None:
    """An ACL user whose password has to be quoted in a URL."""
    password = "p@ss:w/rd %41?#é"
    quoted = urllib.parse.quote(password, safe="")
    with EmbeddedServer() as server, redis.Redis(port=server.port) as client:
        client.acl_setuser(
            "shop",
            enabled=True,
            passwords=[f"+{password}"],
            keys=["*"],
            channels=["*"],
            categories=["+@all"],
        )
        client.acl_setuser("default", enabled=False)
        broker, results = (
            f"redis://shop:{quoted}@127.0.0.1:{server.port}/{number}" for number in (0, 1)
        )
        _works(scenes(broker, results))


def test_global_keyprefix(
    scenes: StartScene, redis_server: EmbeddedServer, redis_client: redis.Redis
) -> None:
    """Everything in the database, claims included, stands behind kombu's prefix."""
    options = {"global_keyprefix": "tenant:"}
    scene = scenes(
        redis_server.url,
        other_database(redis_server),
        settings={"broker_transport_options": options},
    )
    scene.call("act", "kept", queue="parked")
    assert scene.claims.names()
    assert all(key.startswith("tenant:") for key in redis_client.scan_iter())
    _works(scene)


def test_two_apps_in_one_process(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """Each app has its own claims, also where task and arguments are the same."""
    with EmbeddedServer() as another:
        here = scenes(redis_server.url, other_database(redis_server))
        there = scenes(another.url, other_database(another))
        first, second = (scene.call("act", "same", queue="parked") for scene in (here, there))
        assert not first.duplicate
        assert not second.duplicate
        assert (here.claim("same")["owner"], there.claim("same")["owner"]) == (
            first.id,
            second.id,
        )
        _works(here)
        _works(there)


def test_two_apps_on_one_server(scenes: StartScene, redis_server: EmbeddedServer) -> None:
    """Two apps that share a database keep apart by reliable_key_prefix."""
    urls = (redis_server.url, other_database(redis_server))
    here = scenes(*urls)
    there = scenes(*urls, settings={"reliable_key_prefix": "other:"})
    assert not here.call("act", "same", queue="parked").duplicate
    assert not there.call("act", "same", queue="parked").duplicate
    assert here.call("act", "same", queue="parked").duplicate
