"""What the scripts do for a claim that is not simply held until its task has ended."""

from __future__ import annotations

import pytest

from reliable_tasks._store.claims import Entry, Publish, Release
from tests.conformance.conftest import NAME, SECOND, Store
from tests.support.claims import abandon

# -- a window ----------------------------------------------------------------------------------


def test_a_window_is_as_long_as_it_was_called_for(store: Store) -> None:
    """The key is taken until then, and says that it is taken for a window."""
    store.acquire(ttl=0.6, how="window")
    assert store.acquire(ttl=60, how="window").code is Publish.CLAIMED, "the same, repeated"
    assert store.record["window"] == "1"
    assert store.acquire("two", token=SECOND, how="window").code is Publish.DUPLICATE
    assert store.lapses_in <= 0.6
    store.let_pass(0.7)
    assert store.acquire("two", token=SECOND, how="window").code is Publish.CLAIMED


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


def test_a_turn_knows_no_attempts(store: Store) -> None:
    """They say nothing of whose turn it is: a replacement of a retry begins at 0 again."""
    store.enter(attempt=1, lease=0.2, ttl=60, takes=True)
    assert store.enter(holder="h2", takes=True).code is Entry.RUNNING
    store.let_pass(0.3)
    assert store.enter(holder="h2", takes=True).code is Entry.ENTERED


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
    second = store.replace()
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
    store.replace()
    store.enter("two", holder="h2")
    store.release("two", holder="h2")
    assert store.record == {}
    assert store.enter().code is Entry.REPLACED
    assert store.start().code is Entry.REPLACED


def test_an_id_that_is_used_again_was_not_replaced(store: Store) -> None:
    """What is known of the first call with it says nothing of the second."""
    store.acquire()
    store.replace()
    store.release("two", holder="", may_be_unentered=True)
    store.acquire(token="t3")
    assert store.start().code is Entry.ENTERED
    assert store.start().code is Entry.ENTERED, "a copy that comes back"


def test_a_repeated_replacement_answers_as_the_first_did(store: Store) -> None:
    """A call whose reply was lost does not replace itself."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    before = store.record
    again = store.acquire("two", token=SECOND, how="replace")
    assert (again.code, again.owner) == (Publish.TAKEN_OVER, "one")
    assert store.record == before
    store.confirm("two")
    store.confirm("two")
    assert store.claims.replaced_by(NAME, "one") == "two"


def test_a_replacement_whose_caller_died_replaces_nobody(store: Store) -> None:
    """Nobody knows whether its message is queued: the other one waits a while, and runs then."""
    store.acquire(ttl=90)
    store.acquire("two", token=SECOND, how="replace", ttl=90)
    for answer in (store.enter(), store.start()):
        assert answer.code is Entry.PREDECESSOR_RUNNING
        assert answer.seconds == pytest.approx(30, abs=2)
    store.age(31)
    assert store.start().code is Entry.ENTERED
    assert store.enter().code is Entry.ENTERED
    assert store.record["owner"] == "one"
    assert "replaces" not in store.record


def test_a_replacement_that_starts_was_published(store: Store) -> None:
    """Its caller died before it could say so."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    assert store.enter("two", holder="h2").code is Entry.ENTERED
    store.release("two", holder="h2")
    assert store.enter().code is Entry.REPLACED


def test_replacements_that_fail_give_the_key_back_to_who_is_queued(store: Store) -> None:
    """One of them replaced the other meanwhile, of which there is no message."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    store.acquire("three", token="t3", how="replace")
    assert not store.abandon("two", token=SECOND)
    assert store.abandon("three", token="t3")
    assert store.enter().code is Entry.ENTERED


def test_a_replacement_that_was_replaced_before_it_was_queued(store: Store) -> None:
    """Its message ends unrun as well."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    store.acquire("three", token="t3", how="replace")
    store.confirm("two")
    store.confirm("three")
    assert store.claims.replaced_by(NAME, "one") == "two"
    assert store.claims.replaced_by(NAME, "two") == "three"


def test_a_replacement_that_fails_gives_the_key_back_to_the_last_that_is_queued(
    store: Store,
) -> None:
    """Not to the one which that one has replaced."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    store.acquire("three", token="t3", how="replace")
    store.confirm("two")
    assert store.abandon("three", token="t3")
    assert store.record["owner"] == "two"
    assert store.enter().code is Entry.REPLACED
    assert store.enter("two", holder="h2").code is Entry.ENTERED


def test_a_replacement_that_starts_before_it_is_confirmed(store: Store) -> None:
    """It was published, for it is here; and its caller's word comes too late to mean it."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    assert store.start("two").code is Entry.ENTERED
    store.acquire("three", token="t3")
    store.confirm("two")
    assert store.start().code is Entry.REPLACED
    assert store.start("two").code is Entry.ENTERED, "its copy that comes back"


def test_a_call_with_the_owners_id_replaces_nothing(store: Store) -> None:
    """Both messages would be ended unrun."""
    store.acquire()
    assert store.acquire(token=SECOND, how="replace").code is Publish.DUPLICATE


def test_a_replacement_waits_for_the_one_that_runs(store: Store) -> None:
    """Two never run at once, and the end of the first lets the second in."""
    store.acquire()
    store.enter(lease=30)
    store.replace()
    assert store.enter("two", holder="h2").code is Entry.PREDECESSOR_RUNNING
    assert store.enter().code is Entry.ENTERED, "the run itself, whose reply was lost"
    assert store.enter(holder="h3").code is Entry.RUNNING, "a copy of it, which must not end it"
    assert store.release() == (Release.KEPT, "two")
    assert store.enter("two", holder="h2").code is Entry.ENTERED
    assert "holder_owner" not in store.record


def test_a_replacement_that_is_not_published_gives_the_key_back(store: Store) -> None:
    """The call before it is not replaced by nothing."""
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    assert abandon(store.claims, NAME, owner="two", token=SECOND)
    assert store.claims.replaced_by(NAME, "one") is None
    assert store.enter().code is Entry.ENTERED


def test_a_replacement_lives_as_long_as_the_run_before_it_is_covered(store: Store) -> None:
    """A short allowance for the queue does not uncover who runs."""
    store.acquire()
    store.enter(lease=500, ttl=500)
    store.acquire("two", token=SECOND, how="replace", ttl=5)
    assert store.lapses_in == pytest.approx(500, abs=2)


def test_a_replacement_that_ends_unrun_gives_the_key_back_to_the_one_that_runs(
    store: Store,
) -> None:
    """It was revoked, or has expired; the end of the run frees the key."""
    store.acquire()
    store.enter()
    store.replace()
    assert store.release("two", holder="other", may_be_unentered=True) == (Release.FREED, "two")
    assert store.record["owner"] == "one"
    assert store.claims.replaced_by(NAME, "one") is None
    assert store.release()[0] is Release.FREED


def test_nothing_is_given_back_to_a_task_that_has_ended(store: Store) -> None:
    """A replacement is not published, and the one before it has ended meanwhile."""
    store.acquire()
    store.enter()
    store.acquire("two", token=SECOND, how="replace")
    store.release()
    assert store.abandon("two", token=SECOND)
    assert store.record == {}
    store.acquire()
    store.acquire("two", token=SECOND, how="replace")
    store.release(holder="", may_be_unentered=True)
    assert store.abandon("two", token=SECOND)
    assert store.record == {}


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


@pytest.mark.parametrize("dies", [False, True])
def test_a_caller_that_comes_back_before_its_successor_starts(store: Store, dies: bool) -> None:
    """It went back to its queue, or its worker died: it runs on, and the other one waits."""
    store.acquire()
    store.enter(lease=0.2, ttl=60)
    store.acquire("two", token=SECOND, holder="h1")
    store.confirm("two")
    if dies:
        store.let_pass(0.3)
    else:
        assert store.release(keep_for=30) == (Release.KEPT, "two")
    assert store.enter(holder="h3").code is Entry.ENTERED
    assert store.enter("two", holder="h2").code is Entry.PREDECESSOR_RUNNING
    again = store.acquire("three", token="t3", holder="h3")
    assert (again.code, again.owner) == (Publish.DUPLICATE, "two"), "it has called itself before"
    assert store.release(holder="h3") == (Release.KEPT, "two")
    assert store.enter("two", holder="h2").code is Entry.ENTERED


@pytest.mark.parametrize("dies", [False, True])
def test_a_successor_that_ends_unrun_gives_the_claim_back(store: Store, dies: bool) -> None:
    """To its caller that runs, or that was interrupted and comes back."""
    store.acquire()
    store.enter(lease=0.2, ttl=60)
    store.acquire("two", token=SECOND, holder="h1")
    store.confirm("two")
    if dies:
        store.let_pass(0.3)
    assert store.release("two", holder="other", may_be_unentered=True) == (Release.FREED, "two")
    assert store.acquire("three", token="t3").code is Publish.DUPLICATE
    assert store.enter(holder="h1" if not dies else "h3").code is Entry.ENTERED


def test_a_successor_that_goes_back_keeps_its_claim(store: Store) -> None:
    """Its child was killed before it had begun."""
    store.acquire()
    store.enter()
    store.acquire("two", token=SECOND, holder="h1")
    answer = store.release("two", holder="other", may_be_unentered=True, keep_for=30)
    assert answer == (Release.KEPT, "two")


def test_a_caller_that_comes_back_too_late(store: Store) -> None:
    """Its successor has started."""
    store.acquire()
    store.enter(lease=0.2, ttl=60)
    store.acquire("two", token=SECOND, holder="h1")
    store.let_pass(0.3)
    assert store.enter("two", holder="h2").code is Entry.ENTERED
    assert store.enter(holder="h3").code is Entry.DUPLICATE


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
    assert abandon(store.claims, NAME, owner="two", token=SECOND)
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


def test_a_copy_that_only_asks_does_not_shorten_a_claim(store: Store) -> None:
    """What a worker may take to come back is not what a message may wait."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(delivery="tag")
    store.replace(ttl=4200)
    store.server.zrem(store.claims.leases, "tag")
    assert store.enter(holder="h3", ttl=40).code is Entry.REPLACED
    store.acquire("three", token="t3", ttl=40)
    assert store.lapses_in == pytest.approx(4200, abs=5), "as was allowed to who waits"


def test_a_run_whose_message_is_acknowledged_is_covered_until_it_is_dead(store: Store) -> None:
    """A revoke acknowledges first, and the child may take its time."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(lease=30, delivery="tag")
    assert store.claims.uncover(NAME, holder="h1", grace=5)
    assert not store.claims.uncover(NAME, holder="other", grace=500)
    store.server.zrem(store.claims.leases, "tag")
    assert store.enter(holder="h2").code is Entry.RUNNING
    assert store.lapses_in == pytest.approx(30, abs=2)
    assert store.release()[0] is Release.FREED
    store.enter(lease=0.1, delivery="tag")
    store.let_pass(0.2)
    store.claims.uncover(NAME, holder="h1", grace=5)
    assert store.enter(holder="h2").code is Entry.RUNNING, "for as long as a kill may take"


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


def test_a_long_run_is_freed_by_itself_alone(store: Store) -> None:
    """Its lease is over, but that of its message is not: an end of another copy frees nothing."""
    store.acquire()
    store.put_on_lease("tag", 60)
    store.enter(lease=0.1, delivery="tag")
    store.let_pass(0.2)
    assert store.release(holder="h2", may_be_unentered=True) == (Release.NOT_OURS, "one")
    assert store.release()[0] is Release.FREED


def test_a_claim_is_kept_for_who_waits_in_a_worker(store: Store) -> None:
    """It is the owner's alone to keep, and never made shorter."""
    store.acquire(ttl=5)
    assert store.claims.keep(NAME, owner="one", ttl=60).code is Entry.ENTERED
    assert store.lapses_in == pytest.approx(60, abs=2)
    assert store.claims.keep(NAME, owner="one", ttl=5).code is Entry.ENTERED
    other = store.claims.keep(NAME, owner="two", ttl=500)
    assert (other.code, other.owner) == (Entry.DUPLICATE, "one")
    assert store.lapses_in == pytest.approx(60, abs=2)
