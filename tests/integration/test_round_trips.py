"""What the library costs in round trips, counted by the servers.

MONITOR shows what scripts call as well; those lines cost no round trip and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from reliable_tasks import dead_letters
from reliable_tasks._store.scripts import load
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import other_database
from tests.integration.scene import Scene
from tests.support import Monitor, MonitoredCommand, wait_until

SCRIPTS = [
    load(name)
    for name in (
        *("claim_acquire", "claim_continue", "claim_abandon", "claim_enter", "claim_release"),
        *("message_publish", "message_settle", "message_bury", "run_start"),
    )
]


def name_of(command: MonitoredCommand) -> str:
    """Return a command's name, or that of the script of ours that it runs."""
    for script in SCRIPTS:
        # It is sent whole where nobody waits for an answer, and where the server lacks it.
        forms = (script.sha, escaped(script.code), escaped(script.source))
        if any(form in command.text for form in forms):
            return script.name
    return command.name


def escaped(source: str) -> str:
    """Return a script as MONITOR shows it."""
    return source.replace("\\", r"\\").replace("\n", r"\n")


@dataclass
class Watched:
    """An app, the servers that it talks to, and whether its broker makes its claims."""

    scene: Scene
    servers: tuple[EmbeddedServer, ...]
    claims_at_broker: bool

    @property
    def claim(self) -> list[str]:
        """What a claim costs besides the publish."""
        return [] if self.claims_at_broker else ["claim_acquire"]

    def sent(self, action: Callable[[], object]) -> list[str]:
        """Return what the servers are sent while something is done; our scripts by name."""
        # The test before has left no connection, and what opens one is not counted.
        self.scene.call("plain", "warm-up")
        if self.scene.workers:
            self.wait_idle()
        monitors = [Monitor(server.url) for server in self.servers]
        for monitor in monitors:
            monitor.__enter__()
        action()
        for monitor in monitors:
            monitor.__exit__(None, None, None)
        return [name_of(command) for monitor in monitors for command in monitor.commands]

    def wait_idle(self) -> None:
        """Wait until nothing is queued or held."""
        with self.scene.app.connection_for_read() as connection:
            redis = connection.default_channel.client
            wait_until(lambda: not redis.exists("celery", "unacked"), 10)

    def scripts(self, action: Callable[[], object]) -> list[str]:
        """Return which of our scripts are run while something is done."""
        return [command for command in self.sent(action) if command.startswith("claim_")]


@pytest.fixture(scope="module", params=["the broker", "another"])
def caller(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """An app without a worker, so that nobody but the caller talks to its servers."""
    with EmbeddedServer() as broker, EmbeddedServer() as locks:
        settings = {"reliable_redis_url": locks.url} if request.param == "another" else {}
        directory: Path = tmp_path_factory.mktemp("round-trips")
        results = other_database(broker)
        with Scene(directory, broker.url, results, settings=settings) as scene:
            for task in ("act", "sleep", "plain"):
                # Scripts are loaded before anything is counted.
                scene.call(task, "warm-up")
            yield Watched(scene, (broker, locks), not settings)


@pytest.fixture(scope="module")
def shop(caller: Watched) -> Watched:
    """The same app with a worker, for the tests that come after those of the caller."""
    caller.scene.worker()
    caller.scene.call("flaky", "warm-up", 1).get(timeout=10)
    caller.scene.wait_free("warm-up", 1, task="flaky")
    caller.scene.wait_free("warm-up")
    return caller


def test_a_claim_costs_nothing_where_the_broker_makes_it(caller: Watched) -> None:
    """It is taken in the script that queues; another Redis is asked once. Else all is Celery's."""
    plain = caller.sent(lambda: caller.scene.call("plain", "first"))
    assert "message_publish" in plain
    once = caller.sent(lambda: caller.scene.call("act", "first"))
    assert sorted(once) == sorted([*plain, *caller.claim])


def test_a_duplicate_is_told_in_one_round_trip(caller: Watched) -> None:
    """Nothing is queued; Celery's subscription to a result that will not come is ended."""
    caller.scene.call("act", "twice")
    sent = caller.sent(lambda: caller.scene.call("act", "twice"))
    if caller.claims_at_broker:
        assert sorted(sent) == ["SUBSCRIBE", "UNSUBSCRIBE", "message_publish"]
    else:
        assert sent == ["claim_acquire"]


def test_a_call_without_once_costs_nothing(caller: Watched) -> None:
    """A ReliableTask that uses no feature of ours sends what a plain task sends."""
    plain = caller.sent(lambda: caller.scene.call("plain", "second"))
    assert caller.sent(lambda: caller.scene.call("sleep", "second")) == plain


def test_a_run_costs_one_round_trip_at_its_start_and_one_at_its_end(shop: Watched) -> None:
    """From the call to the freed key three scripts are sent."""
    name = uuid4().hex

    def run() -> None:
        shop.scene.call("act", name).get(timeout=10)
        shop.scene.wait_free(name)

    assert shop.scripts(run) == [*shop.claim, "claim_enter", "claim_release"]


def test_a_retry_costs_a_round_trip_for_each_of_its_steps(shop: Watched) -> None:
    """A retry is a publish like another, and the end of one run before the start of the next."""
    name = uuid4().hex

    def run() -> None:
        shop.scene.call("flaky", name, 1).get(timeout=10)
        shop.scene.wait_free(name, 1, task="flaky")

    continued = [] if shop.claims_at_broker else ["claim_continue"]
    assert shop.scripts(run) == [
        *(*shop.claim, "claim_enter", *continued, "claim_release"),
        *("claim_enter", "claim_release"),
    ]


def test_a_run_without_once_costs_nothing(shop: Watched) -> None:
    """None of our scripts is run for a ReliableTask that uses no feature of ours."""
    assert shop.scripts(lambda: shop.scene.call("sleep", uuid4().hex).get(timeout=10)) == []


def test_the_crash_count_costs_one_command_that_nobody_waits_for(shop: Watched) -> None:
    """A start is counted by a command without an answer; the acknowledgement takes it back."""

    def run() -> None:
        shop.scene.call("sleep", uuid4().hex).get(timeout=10)
        shop.wait_idle()

    sent = shop.sent(run)
    assert (sent.count("run_start"), sent.count("message_settle")) == (1, 1)


def test_a_dead_letter_costs_no_round_trip(shop: Watched) -> None:
    """It is kept by the step that acknowledges its message."""
    app = shop.scene.app

    def run() -> None:
        count = dead_letters.count(app=app)
        with pytest.raises(ValueError, match="dies"):
            shop.scene.call("bare", "dies", "fail").get(timeout=10)
        wait_until(lambda: dead_letters.count(app=app) == count + 1, 10)

    # Scripts are loaded before anything is counted.
    run()
    sent = shop.sent(run)
    assert (sent.count("run_start"), sent.count("message_bury")) == (1, 1)
    assert sent.count("message_settle") == 0
