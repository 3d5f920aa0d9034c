"""What the scripts do for a claim that is not simply held until its task has ended."""

from __future__ import annotations

import pytest

from reliable_tasks._store.claims import Entry, Publish, Release
from tests.conformance.conftest import NAME, SECOND, Store

# -- a window ----------------------------------------------------------------------------------


def test_a_window_outlasts_its_task(store: Store) -> None:
    """The key stays taken when the task has ended, and free it is when the window is over."""
    store.acquire(ttl=0.6, how="window")
    store.enter(ttl=60)
    assert store.release() == (Release.KEPT, "one")
    assert store.acquire("two", token=SECOND).code is Publish.DUPLICATE
    assert store.lapses_in <= 0.6
    store.let_pass(0.7)
    assert store.record == {}
    assert store.acquire("two", token=SECOND).code is Publish.CLAIMED


def test_no_copy_runs_again_in_a_window(store: Store) -> None:
    """A message that comes back after its task has ended is acknowledged unrun."""
    store.acquire(ttl=60, how="window")
    store.enter()
    store.release()
    assert store.enter(holder="h2").code is Entry.CONTINUED


def test_a_run_that_outlasts_its_window_keeps_the_key(store: Store) -> None:
    """No other task runs beside it, and its end frees the key."""
    store.acquire(ttl=0.3, how="window")
    store.enter(ttl=60)
    store.let_pass(0.4)
    assert store.acquire("two", token=SECOND).code is Publish.DUPLICATE
    assert store.release()[0] is Release.FREED


def test_a_start_does_not_cut_a_window_short(store: Store) -> None:
    """A claim lives as long as its window, also where a run is covered for less."""
    store.acquire(ttl=60, how="window")
    store.enter(ttl=5)
    assert store.lapses_in == pytest.approx(60, abs=2)


def test_a_retry_goes_on_within_a_window(store: Store) -> None:
    """The continuation starts, and its end leaves the rest of the window."""
    store.acquire(ttl=60, how="window")
    store.enter()
    store.continue_(ttl=5)
    assert store.lapses_in == pytest.approx(60, abs=2)
    assert store.release() == (Release.KEPT, "one")
    assert store.enter(attempt=1, holder="h2").code is Entry.ENTERED
    assert store.release(attempt=1, holder="h2") == (Release.KEPT, "one")
    assert store.enter(attempt=1, holder="h3").code is Entry.CONTINUED


# -- a key that is free when its task starts -----------------------------------------------------


def test_a_start_frees_the_key(store: Store) -> None:
    """The next call can be queued, and a repeated start is let in as the first was."""
    fence = store.acquire().fence
    started = store.start()
    assert (started.code, started.owner, started.fence) == (Entry.ENTERED, "one", fence)
    assert store.record == {}
    assert store.start().code is Entry.ENTERED
    assert store.acquire("two", token=SECOND).code is Publish.CLAIMED


def test_a_start_of_a_task_that_does_not_own_the_key(store: Store) -> None:
    """It learns who does, and changes nothing."""
    acquired = store.acquire(ttl=45)
    ticket = store.start("two")
    assert (ticket.code, ticket.owner, ticket.fence) == (Entry.DUPLICATE, "one", acquired.fence)
    assert ticket.seconds == pytest.approx(45, abs=2)
    assert store.record["owner"] == "one"


def test_a_start_of_an_attempt_that_was_continued(store: Store) -> None:
    """The retry has the key, and the late copy leaves it alone."""
    store.acquire()
    store.continue_(holder="")
    store.release(may_be_unentered=True)
    assert store.start().code is Entry.CONTINUED
    assert store.record["owner"] == "one"


# -- turns ---------------------------------------------------------------------------------------


def test_one_has_its_turn_and_the_others_wait(store: Store) -> None:
    """Who comes while another task runs learns how long that is covered."""
    store.enter(lease=30, takes=True)
    ticket = store.enter("two", holder="h2", takes=True)
    assert (ticket.code, ticket.owner) == (Entry.DUPLICATE, "one")
    assert ticket.seconds == pytest.approx(30, abs=2)
    store.release()
    assert store.enter("two", holder="h2", takes=True).code is Entry.ENTERED


def test_a_turn_whose_holder_died_is_free(store: Store) -> None:
    """Its copy that comes back waits for another one."""
    first = store.enter(lease=0.2, ttl=60, takes=True)
    store.let_pass(0.3)
    second = store.enter("two", holder="h2", takes=True)
    assert second.code is Entry.ENTERED
    assert second.fence > first.fence
    assert store.record["owner"] == "two"
    assert store.release() == (Release.NOT_OURS, "two")
    assert store.enter(holder="h3", takes=True).code is Entry.DUPLICATE


def test_the_claim_of_a_task_that_died_is_left_to_it(store: Store) -> None:
    """Where a call took the key, the copy that comes back finds it."""
    store.acquire()
    store.enter(lease=0.2, ttl=60)
    store.let_pass(0.3)
    assert store.enter("two", holder="h2").code is Entry.DUPLICATE


# -- replaced ------------------------------------------------------------------------------------


def test_a_call_replaces_the_owners(store: Store) -> None:
    """It owns the key; the message before it learns, when it arrives, who has its place."""
    first = store.acquire()
    second = store.acquire("two", token=SECOND, how="replace")
    assert (second.code, second.owner) == (Publish.TAKEN_OVER, "one")
    assert second.fence > first.fence
    assert store.claims.replaced_by(NAME, "one") == "two"
    assert store.claims.replaced_by(NAME, "two") is None
    late = store.enter()
    assert (late.code, late.owner) == (Entry.REPLACED, "two")
    assert store.start().code is Entry.REPLACED
    assert store.enter("two", holder="h2").code is Entry.ENTERED


def test_a_replaced_call_is_known_when_the_key_is_free_again(store: Store) -> None:
    """The new one has run and ended before the old message arrives."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    store.enter("two", holder="h2")
    store.release("two", holder="h2")
    assert store.record == {}
    assert store.enter().code is Entry.REPLACED
    assert store.start().code is Entry.REPLACED


def test_a_repeated_replacement_answers_that_it_has_the_key(store: Store) -> None:
    """A call whose reply was lost does not replace itself."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    before = store.record
    assert store.acquire("two", token=SECOND, how="replace").code is Publish.CLAIMED
    assert store.record == before


def test_a_call_with_the_owners_id_replaces_nothing(store: Store) -> None:
    """Both messages would be ended unrun."""
    store.acquire()
    assert store.acquire(token=SECOND, how="replace").code is Publish.DUPLICATE


def test_a_replacement_waits_for_the_one_that_runs(store: Store) -> None:
    """Two never run at once, and the end of the first lets the second in."""
    store.acquire()
    store.enter(lease=30)
    store.acquire("two", token=SECOND, how="replace")
    ticket = store.enter("two", holder="h2")
    assert ticket.code is Entry.PREDECESSOR_RUNNING
    assert store.release() == (Release.KEPT, "two")
    assert store.enter("two", holder="h2").code is Entry.ENTERED
    assert "holder_owner" not in store.record


def test_a_replacement_that_is_not_published_gives_the_key_back(store: Store) -> None:
    """The call before it is not replaced by nothing."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    assert store.claims.abandon(NAME, owner="two", token=SECOND)
    assert store.claims.replaced_by(NAME, "one") is None
    assert store.enter().code is Entry.ENTERED


def test_a_replacement_lives_as_long_as_the_run_before_it_is_covered(store: Store) -> None:
    """A short allowance for the queue does not uncover who runs."""
    store.acquire()
    store.enter(lease=500, ttl=500)
    store.acquire("two", token=SECOND, how="replace", ttl=5)
    assert store.lapses_in == pytest.approx(500, abs=2)


# -- handed on -----------------------------------------------------------------------------------


def test_a_task_that_calls_itself_hands_its_claim_on(store: Store) -> None:
    """The new call owns the key at once, and starts when the caller has ended."""
    store.acquire()
    store.enter()
    ticket = store.acquire("two", token=SECOND, holder="h1")
    assert (ticket.code, ticket.owner) == (Publish.TAKEN_OVER, "one")
    assert store.claims.replaced_by(NAME, "one") is None
    assert store.enter("two", holder="h2").code is Entry.PREDECESSOR_RUNNING
    assert store.release() == (Release.KEPT, "two")
    assert store.enter("two", holder="h2").code is Entry.ENTERED


def test_a_second_call_of_itself_is_a_duplicate_of_the_first(store: Store) -> None:
    """A task hands on what it has, once."""
    store.acquire()
    store.enter()
    store.acquire("two", token=SECOND, holder="h1")
    ticket = store.acquire("three", token="t3", holder="h1")
    assert (ticket.code, ticket.owner) == (Publish.DUPLICATE, "two")


def test_what_is_handed_on_waits_for_no_dead_caller(store: Store) -> None:
    """Its lease is over, and its successor starts."""
    store.acquire()
    store.enter(lease=0.2, ttl=60)
    store.acquire("two", token=SECOND, holder="h1")
    store.let_pass(0.3)
    assert store.enter("two", holder="h2").code is Entry.ENTERED


def test_a_call_of_itself_that_is_not_published_gives_the_claim_back(store: Store) -> None:
    """The caller holds it again, and can retry."""
    store.acquire()
    store.enter()
    store.acquire("two", token=SECOND, holder="h1")
    assert store.claims.abandon(NAME, owner="two", token=SECOND)
    assert "holder_owner" not in store.record
    assert store.continue_(holder="h1", token="t3").code is Publish.CLAIMED


# -- a run whose message is on lease ---------------------------------------------------------------


def test_a_run_is_covered_while_its_message_is_on_lease(store: Store) -> None:
    """However long it takes: neither its lease nor its claim's time counts."""
    store.acquire(ttl=0.2)
    store.put_on_lease("tag", 60)
    store.enter(lease=0.1, ttl=0.2, delivery="tag")
    store.let_pass(0.4)
    assert store.acquire("two", token=SECOND).code is Publish.DUPLICATE
    assert store.enter(holder="h2").code is Entry.RUNNING
    assert store.release()[0] is Release.FREED


def test_the_claim_of_a_dead_run_lapses_in_time(store: Store) -> None:
    """From the first call on that finds its worker dead: its message is in the queue again."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(delivery="tag")
    assert store.acquire("two", token=SECOND, ttl=5).code is Publish.DUPLICATE
    assert store.lapses_in > 3600
    store.server.zrem(store.claims.leases, "tag")
    assert store.acquire("two", token=SECOND, ttl=5).code is Publish.DUPLICATE
    assert store.lapses_in == pytest.approx(5, abs=1)
    store.acquire("two", token=SECOND, ttl=500)
    assert store.lapses_in <= 5, "no later call makes it longer"
    assert store.enter(holder="h2").code is Entry.ENTERED, "its copy that came back"


def test_a_window_is_not_cut_short_by_a_death(store: Store) -> None:
    """It is a window whatever happens."""
    store.acquire(ttl=60, how="window")
    store.put_on_lease("other", 60)
    store.enter(delivery="other")
    store.server.zrem(store.claims.leases, "other")
    store.acquire("two", token=SECOND, ttl=1)
    assert store.lapses_in == pytest.approx(60, abs=2)


def test_a_message_that_is_on_no_lease_covers_nothing(store: Store) -> None:
    """The worker could not renew: the run is covered for as long as it may take."""
    store.acquire()
    store.enter(lease=30, ttl=40, delivery="tag")
    assert "delivery" not in store.record
    assert store.lapses_in == pytest.approx(40, abs=2)
    assert store.enter(holder="h2").code is Entry.RUNNING


def test_what_goes_back_waits_as_a_call_does(store: Store) -> None:
    """A requeued message's claim does not keep the time of a run."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(delivery="tag")
    assert store.release(keep_for=30) == (Release.KEPT, "one")
    assert store.lapses_in == pytest.approx(30, abs=2)


def test_what_was_handed_on_waits_as_a_call_does(store: Store) -> None:
    """From the end of the caller on."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(delivery="tag")
    store.acquire("two", token=SECOND, holder="h1", ttl=20)
    assert store.lapses_in > 3600
    assert store.release() == (Release.KEPT, "two")
    assert store.lapses_in == pytest.approx(20, abs=2)
    store.put_on_lease("other", 60)
    store.enter("two", holder="h2", delivery="other")
    assert "allowance" not in store.record
