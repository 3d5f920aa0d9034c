"""One suite, two servers: what users test against and what they run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pytest
import redis
import time_machine

from reliable_tasks._store.claims import Claims, Entry, Publish, Release, Ticket
from reliable_tasks._store.client import ServerAddress, forget_clients
from reliable_tasks._store.publication import How
from reliable_tasks.testing import fake_redis
from tests.conformance.broker import Broker
from tests.conformance.clock import OnAClock
from tests.support.claims import abandon, confirm

#: Tokens of two publishes.
FIRST, SECOND = "t1", "t2"
NAME = "shop.send_invoice:invoice_7:0123456789abcdef"


class Store(OnAClock):
    """Claims in one of the servers, with short names for what the tests call often.

    Args:
        address: Where the server is.
        traveller: The clock of a fake server; a real one has its own.
    """

    def __init__(
        self, address: ServerAddress, traveller: time_machine.Traveller | None = None
    ) -> None:
        super().__init__(traveller)
        self.address = address
        self.claims = Claims(address, "reliable:")
        self.server = self.claims.client.redis

    @property
    def key(self) -> str:
        """The key of the claim that the tests are about."""
        return f"{self.address.key_prefix}reliable:claim:{{{NAME}}}"

    @property
    def record(self) -> dict[str, str]:
        """The claim as it stands."""
        return self.claims.read(NAME)

    @property
    def lapses_in(self) -> float:
        """Seconds until the server forgets the claim."""
        return float(self.server.pttl(self.key)) / 1000

    def acquire(
        self,
        owner: str = "one",
        attempt: int = 0,
        token: str = FIRST,
        ttl: float = 60,
        how: How = "acquire",
        holder: str = "",
    ) -> Ticket[Publish]:
        """Publish a new call."""
        return self.claims.acquire(
            NAME,
            owner=owner,
            attempt=attempt,
            token=token,
            ttl=ttl,
            task="shop.send_invoice",
            how=how,
            holder=holder,
        )

    def continue_(
        self,
        owner: str = "one",
        attempt: int = 1,
        token: str = SECOND,
        ttl: float = 60,
        holder: str = "h1",
    ) -> Ticket[Publish]:
        """Publish a retry."""
        return self.claims.continue_(
            NAME,
            owner=owner,
            attempt=attempt,
            token=token,
            ttl=ttl,
            task="shop.send_invoice",
            holder=holder,
        )

    def enter(
        self,
        owner: str = "one",
        attempt: int = 0,
        holder: str = "h1",
        lease: float = 30,
        ttl: float = 60,
        takes: bool = False,
        delivery: str = "",
    ) -> Ticket[Entry]:
        """Start a copy."""
        return self.claims.enter(
            NAME,
            owner=owner,
            attempt=attempt,
            holder=holder,
            lease=lease,
            ttl=ttl,
            task="shop.send_invoice",
            takes=takes,
            delivery=delivery,
        )

    def confirm(self, owner: str = "two", attempt: int = 0) -> None:
        """Say that the message of a call is queued."""
        confirm(self.claims, NAME, owner=owner, attempt=attempt)

    def replace(self, owner: str = "two", token: str = SECOND, **options: Any) -> Ticket[Publish]:
        """Publish a call that replaces the owner's; its message is queued."""
        ticket = self.acquire(owner, token=token, how="replace", **options)
        self.confirm(owner)
        return ticket

    def age(self, seconds: float) -> None:
        """Let the claim be that much older."""
        since = int(self.record["since"]) - round(seconds * 1000)
        self.server.hset(self.key, "since", since)

    def put_on_lease(self, delivery: str, seconds: float) -> None:
        """Hold a message on lease, as its worker does."""
        self.server.zadd(self.claims.leases, {delivery: (self.now() + seconds) * 1000})

    def start(self, owner: str = "one", attempt: int = 0) -> Ticket[Entry]:
        """Start a copy that gives its key up."""
        return self.claims.start(NAME, owner=owner, attempt=attempt, remember=60)

    def release(
        self,
        owner: str = "one",
        attempt: int = 0,
        holder: str = "h1",
        keep_for: float = 0,
        may_be_unentered: bool = False,
        remember: float = 0,
    ) -> tuple[Release, str]:
        """End a copy."""
        return self.claims.release(
            NAME,
            owner=owner,
            attempt=attempt,
            holder=holder,
            keep_for=keep_for,
            may_be_unentered=may_be_unentered,
            remember=remember,
        )

    def abandon(self, owner: str = "one", token: str = FIRST) -> bool:
        """Take a publish back."""
        return abandon(self.claims, NAME, owner=owner, token=token)


@pytest.fixture(params=["fakeredis", "server"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """An empty store on each kind of server in turn."""
    if request.param == "server":
        yield Store(ServerAddress(request.getfixturevalue("redis_url"), timeout=5.0))
        forget_clients()
        return
    with fake_redis(), time_machine.travel(1_800_000_000, tick=True) as traveller:
        yield Store(ServerAddress("redis://fake/0", timeout=5.0), traveller)


@pytest.fixture(params=["fakeredis", "server"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """An empty broker on each kind of server in turn."""
    if request.param == "server":
        with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
            yield Broker(client)
        return
    with (
        time_machine.travel(1_800_000_000, tick=True) as traveller,
        fakeredis.FakeRedis(server=fakeredis.FakeServer()) as fake,
    ):
        yield Broker(fake, traveller)


@pytest.fixture
def full_broker(redis_url: str) -> Iterator[tuple[Broker, Callable[[], None]]]:
    """A broker on a real server, and what makes its memory full until the test ends."""
    with redis.Redis.from_url(redis_url) as client:
        before = client.config_get("maxmemory")["maxmemory"]  # type: ignore[index]
        yield Broker(client), lambda: client.config_set("maxmemory", 1)
        client.config_set("maxmemory", before)
