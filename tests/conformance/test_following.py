"""What the scripts do for a task that follows the one that owns its key."""

from __future__ import annotations

import pytest

from reliable_tasks._store.claims import End, Follow, Following
from tests.conformance.conftest import NAME, SECOND, Store


def follow(
    store: Store,
    followed: str = "one",
    task_id: str = "me",
    until: int | None = None,
    ttl: float = 60,
) -> Following:
    """Ask how the followed task is."""
    return store.claims.follow(NAME, task_id=task_id, followed=followed, until=until, ttl=ttl)


def end(store: Store, owner: str = "one", state: str = "SUCCESS", ttl: float | None = None) -> None:
    """End a task that runs, and say how."""
    store.claims.release(NAME, owner=owner, attempt=0, holder="h1", end=End(NAME, state, ttl))


def test_it_waits_for_the_owner(store: Store) -> None:
    """For as long as it was asked for, by the server's clock."""
    store.acquire()
    answer = follow(store, ttl=45)
    assert (answer.code, answer.followed, answer.state) == (Follow.WAITS, "one", "")
    assert answer.seconds == 45
    assert answer.until == pytest.approx((store.now() + 45) * 1000, abs=2000)
    store.let_pass(0.5)
    later = follow(store, until=answer.until, ttl=45)
    assert later.until == answer.until
    assert later.seconds < 44.6


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE"])
def test_it_learns_how_the_owner_ended(store: Store, state: str) -> None:
    """Also when another one has the key by then."""
    store.acquire()
    store.enter()
    follow(store)
    end(store, state=state)
    answer = follow(store)
    assert (answer.code, answer.followed, answer.state) == (Follow.ENDED, "one", state)
    store.acquire("two", token=SECOND)
    assert follow(store).state == state


def test_nothing_is_noted_that_nobody_waits_for(store: Store) -> None:
    """An end costs no memory then, except where the key stays taken."""
    store.acquire()
    store.enter()
    end(store)
    assert store.server.keys("*followed*") == []
    assert follow(store).code is Follow.FREE
    store.acquire("two", how="window")
    end(store, "two", ttl=30)
    assert follow(store, "two").code is Follow.ENDED
    assert 0 < store.server.pttl(store.claims.keys.followed(NAME, "two")) <= 30_000


def test_a_key_that_is_free_is_not_waited_for(store: Store) -> None:
    """The owner was forgotten: nobody knows how it ended."""
    store.acquire(ttl=0.3)
    follow(store)
    store.let_pass(0.4)
    answer = follow(store)
    assert (answer.code, answer.followed) == (Follow.FREE, "one")


def test_it_has_the_key_itself(store: Store) -> None:
    """It took it when it was free, and its worker died."""
    store.acquire("me")
    assert follow(store).code is Follow.OURS


def test_who_has_the_owners_place_is_followed_in_its_stead(store: Store) -> None:
    """And so on, for all that followed the first."""
    store.acquire()
    follow(store)
    store.replace("two")
    assert follow(store).followed == "two"
    store.replace("three", token="t3")
    assert follow(store).followed == "three"
    store.enter("three")
    end(store, "three")
    for follower in ("me", "other"):
        answer = follow(store, task_id=follower)
        assert (answer.code, answer.followed) == (Follow.ENDED, "three")


def test_an_owner_that_hands_its_claim_on_is_followed_to_its_end(store: Store) -> None:
    """It runs on, and its successor is another call."""
    store.acquire()
    store.enter()
    follow(store)
    store.acquire("two", token=SECOND, holder="h1")
    store.confirm("two")
    assert follow(store).followed == "one"
    end(store)
    answer = follow(store)
    assert (answer.code, answer.followed, answer.state) == (Follow.ENDED, "one", "SUCCESS")


def test_a_key_that_was_given_up_at_the_start(store: Store) -> None:
    """It is free, and the task goes on: it is waited for until it has ended."""
    store.acquire()
    follow(store)
    store.start()
    assert follow(store).code is Follow.WAITS
    store.acquire("two", token=SECOND)
    assert follow(store).followed == "one"
    store.claims.note_end(End(NAME, "SUCCESS"), owner="one")
    assert follow(store).state == "SUCCESS"


def test_a_late_duplicate_follows_whoever_has_the_key(store: Store) -> None:
    """From then on it is known whom, and until when, though its message does not say so."""
    store.acquire("two")
    assert follow(store, "").code is Follow.FREE, "it follows nobody yet"
    assert store.server.keys("*followed*") == []
    begun = follow(store, "me", ttl=45)
    assert (begun.code, begun.followed) == (Follow.WAITS, "two")
    store.let_pass(0.5)
    again = follow(store, "", ttl=45)
    assert (again.code, again.followed, again.until) == (Follow.WAITS, "two", begun.until)
    store.enter("two")
    end(store, "two")
    assert follow(store, "").state == "SUCCESS"


def test_a_late_duplicate_learns_that_its_time_is_over(store: Store) -> None:
    """What it knows outlives its time."""
    store.acquire("two", ttl=60)
    follow(store, "me", ttl=0.3)
    store.let_pass(0.4)
    answer = follow(store, "", ttl=0.3)
    assert (answer.code, answer.followed) == (Follow.WAITS, "two")
    assert answer.seconds <= 0


def test_one_that_followed_and_owns_the_key_by_now_is_followed(store: Store) -> None:
    """Not the one that it followed before."""
    store.acquire("one", ttl=0.3)
    follow(store, "me", task_id="me")
    store.let_pass(0.4)
    store.acquire("me")
    assert follow(store, "me", task_id="other").followed == "me"
    assert follow(store, "one", task_id="third").followed == "me"
