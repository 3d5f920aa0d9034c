"""Every answer of every script, and what it leaves behind."""

from __future__ import annotations

import pytest

from reliable_tasks._store.claims import Claims, Entry, Publish, Release
from reliable_tasks._store.client import ServerAddress
from tests.conformance.conftest import FIRST, NAME, Store
from tests.support.claims import abandon

# -- acquire ---------------------------------------------------------------------------------


def test_a_free_claim_is_acquired(store: Store) -> None:
    """A free key goes to whoever asks first, for as long as asked."""
    ticket = store.acquire(ttl=45)
    assert (ticket.code, ticket.owner, ticket.seconds) == (Publish.CLAIMED, "one", 45)
    assert store.lapses_in == pytest.approx(45, abs=2)
    record = store.record
    assert (record["owner"], record["attempt"], record["token"]) == ("one", "0", "t1")
    assert (record["task"], int(record["fence"])) == ("shop.send_invoice", ticket.fence)
    assert int(record["since"]) / 1000 == pytest.approx(store.now(), abs=2)


def test_a_taken_claim_is_refused(store: Store) -> None:
    """Another call is told who has the key and until when, and changes nothing."""
    first = store.acquire(ttl=45)
    before = store.record
    second = store.acquire(owner="two", token="other", ttl=900)
    assert (second.code, second.owner) == (Publish.DUPLICATE, "one")
    assert second.seconds == pytest.approx(45, abs=2)
    assert second.fence == first.fence
    assert store.record == before
    assert store.lapses_in <= 45


def test_a_second_call_with_the_owners_id_is_a_duplicate(store: Store) -> None:
    """The same task id does not make it the same call."""
    store.acquire()
    assert store.acquire(token="other").code is Publish.DUPLICATE


def test_a_repeated_acquire_answers_as_the_first_did(store: Store) -> None:
    """A call whose reply was lost is still the call that has the key."""
    first = store.acquire(ttl=45)
    before = store.record
    second = store.acquire(ttl=45)
    assert (second.code, second.owner, second.fence) == (Publish.CLAIMED, "one", first.fence)
    assert second.seconds == pytest.approx(45, abs=2)
    assert store.record == before


def test_the_same_call_by_another_caller_has_the_claim(store: Store) -> None:
    """Either may have queued the message by then, and neither takes the claim back."""
    first = store.acquire(token="call a")
    for token in ("call b", "call b", "call c"):
        assert store.acquire(token=token) == first
    assert store.acquire(token="other a").code is Publish.DUPLICATE
    before = store.record
    for token in ("call a", "call b", "call c"):
        assert not store.abandon(token=token)
    assert store.record == before


def test_a_call_that_nobody_else_has_made_is_taken_back(store: Store) -> None:
    """Though somebody might; and one whose reply was lost is the same caller's."""
    for _ in range(2):
        store.acquire(token="call a")
    assert store.abandon(token="call a")
    assert store.record == {}


def test_an_acquired_claim_lapses(store: Store) -> None:
    """A message that waits for longer than its allowance loses the key."""
    store.acquire(ttl=0.2)
    store.let_pass(0.25)
    assert store.record == {}
    assert store.acquire(owner="two").code is Publish.CLAIMED


# -- enter -----------------------------------------------------------------------------------


def test_the_owner_enters(store: Store) -> None:
    """The copy that was published starts, and its run is covered."""
    acquired = store.acquire()
    ticket = store.enter(lease=30, ttl=40)
    assert (ticket.code, ticket.owner, ticket.seconds) == (Entry.ENTERED, "one", 30)
    assert ticket.fence > acquired.fence
    record = store.record
    assert (record["holder"], record["holder_attempt"]) == ("h1", "0")
    assert int(record["lease_end"]) / 1000 == pytest.approx(store.now() + 30, abs=2)
    assert store.lapses_in == pytest.approx(40, abs=2)
    assert record["token"] == "t1", "a publish that is repeated now is still recognised"


def test_a_task_published_by_name_takes_a_free_claim(store: Store) -> None:
    """A start without an acquire claims the key."""
    ticket = store.enter()
    assert ticket.code is Entry.ENTERED
    record = store.record
    assert (record["owner"], record["attempt"], record["task"]) == ("one", "0", "shop.send_invoice")
    assert int(record["since"]) / 1000 == pytest.approx(store.now(), abs=2)
    assert store.acquire(owner="two").code is Publish.DUPLICATE


def test_another_task_does_not_enter(store: Store) -> None:
    """A task that does not own the key learns who does."""
    acquired = store.acquire(ttl=45)
    before = store.record
    ticket = store.enter(owner="two")
    assert (ticket.code, ticket.owner, ticket.fence) == (Entry.DUPLICATE, "one", acquired.fence)
    assert ticket.seconds == pytest.approx(45, abs=2)
    assert store.record == before


def test_a_lower_attempt_was_continued(store: Store) -> None:
    """A copy whose retry was published already does not run again."""
    store.acquire()
    store.enter()
    store.continue_()
    assert store.release()[0] is Release.KEPT
    before = store.record
    ticket = store.enter(holder="h2")
    assert (ticket.code, ticket.owner, ticket.seconds) == (Entry.CONTINUED, "one", 0)
    assert store.record == before


def test_an_equal_attempt_waits_for_a_live_holder(store: Store) -> None:
    """A redelivered copy does not run beside the one that runs, and learns how long to wait."""
    store.acquire()
    entered = store.enter(lease=30)
    before = store.record
    ticket = store.enter(holder="h2")
    assert (ticket.code, ticket.owner, ticket.fence) == (Entry.RUNNING, "one", entered.fence)
    assert ticket.seconds == pytest.approx(30, abs=2)
    assert store.record == before, "what protects the runner is not touched"


def test_a_retry_waits_for_the_attempt_that_published_it(store: Store) -> None:
    """A retry that comes before its predecessor has ended is told to wait for it."""
    store.acquire()
    store.enter(lease=30)
    store.continue_()
    ticket = store.enter(attempt=1, holder="h2")
    assert ticket.code is Entry.PREDECESSOR_RUNNING
    assert ticket.seconds == pytest.approx(30, abs=2)
    store.release()
    assert store.enter(attempt=1, holder="h2").code is Entry.ENTERED


def test_a_redelivered_copy_takes_over_when_the_lease_has_ended(store: Store) -> None:
    """A holder that is gone keeps the key no longer than its lease."""
    store.acquire()
    first = store.enter(lease=0.2)
    assert store.enter(holder="h2").code is Entry.RUNNING
    store.let_pass(0.25)
    second = store.enter(holder="h2")
    assert second.code is Entry.ENTERED
    assert second.fence > first.fence
    assert store.record["holder"] == "h2"


def test_a_retry_takes_over_when_its_predecessors_lease_has_ended(store: Store) -> None:
    """A predecessor that died after publishing its retry holds nobody up for ever."""
    store.acquire()
    store.enter(lease=0.2)
    store.continue_()
    store.let_pass(0.25)
    assert store.enter(attempt=1, holder="h2").code is Entry.ENTERED


def test_the_holder_enters_again(store: Store) -> None:
    """A start whose reply was lost is repeated, with the same fence."""
    store.acquire()
    first = store.enter()
    second = store.enter()
    assert (second.code, second.fence) == (Entry.ENTERED, first.fence)


def test_a_start_without_a_claim_can_be_repeated(store: Store) -> None:
    """Also where the first start was what claimed the key."""
    first = store.enter()
    second = store.enter()
    assert (second.code, second.fence) == (Entry.ENTERED, first.fence)


def test_a_run_lapses_when_nobody_releases_it(store: Store) -> None:
    """A worker that died, and whose message never came back, frees the key in the end."""
    store.acquire()
    store.enter(lease=0.1, ttl=0.2)
    store.let_pass(0.25)
    assert store.record == {}


def test_a_higher_attempt_raises_the_recorded_one(store: Store) -> None:
    """A retry whose publish never reached the store counts when it starts."""
    store.acquire()
    assert store.enter(attempt=2).code is Entry.ENTERED
    assert store.record["attempt"] == "2"
    assert store.enter(attempt=1, holder="h2").code is Entry.CONTINUED


# -- continue --------------------------------------------------------------------------------


def test_the_holder_continues(store: Store) -> None:
    """A retry keeps the key, from now on for its own time in the queue."""
    store.acquire()
    entered = store.enter()
    ticket = store.continue_(ttl=90)
    assert (ticket.code, ticket.owner, ticket.seconds) == (Publish.CLAIMED, "one", 90)
    assert ticket.fence == entered.fence, "it did not change hands"
    record = store.record
    assert (record["attempt"], record["next_attempt"]) == ("0", "1")
    assert (record["token"], record["holder"]) == ("t2", "h1")
    assert store.lapses_in == pytest.approx(90, abs=2)


def test_a_repeated_continue_answers_as_the_first_did(store: Store) -> None:
    """A retry whose reply was lost is still the owner's retry."""
    store.acquire()
    store.enter()
    first = store.continue_()
    before = store.record
    assert store.continue_() == first
    assert store.record == before


def test_who_is_in_doubt_calls_again_by_the_same_token(store: Store) -> None:
    """Nobody takes its place any more; should it fail again, somebody may."""
    store.acquire()
    assert abandon(store.claims, NAME, owner="one", token=FIRST, in_doubt=True)
    for _ in range(2):
        assert store.acquire().code is Publish.CLAIMED
        assert store.record["unconfirmed"] == "again:one"
    assert store.acquire(owner="two").code is Publish.DUPLICATE
    assert store.abandon()
    assert store.acquire(owner="two").code is Publish.TAKEN_OVER


def test_another_task_does_not_continue(store: Store) -> None:
    """A retry that lost its key to another task is told so."""
    store.acquire(owner="two", ttl=45)
    before = store.record
    ticket = store.continue_()
    assert (ticket.code, ticket.owner) == (Publish.DUPLICATE, "two")
    assert ticket.seconds == pytest.approx(45, abs=2)
    assert store.record == before


def test_a_run_that_was_taken_over_does_not_continue(store: Store) -> None:
    """A zombie cannot publish the retry of the copy that took its place."""
    store.acquire()
    store.enter(lease=0.1)
    store.let_pass(0.15)
    store.enter(holder="h2")
    before = store.record
    assert store.continue_(holder="h1").code is Publish.DUPLICATE
    assert store.record == before
    assert store.continue_(holder="h2").code is Publish.CLAIMED


def test_a_continuation_can_be_published_again(store: Store) -> None:
    """A run whose first try failed without a trace tries again with another token."""
    store.acquire()
    store.enter()
    store.continue_(token="t2")
    assert store.continue_(token="t3").code is Publish.CLAIMED
    assert store.record["token"] == "t3"


def test_a_zombie_publishes_no_second_retry(store: Store) -> None:
    """An attempt that was continued by the copy in its place is not continued again."""
    store.acquire()
    store.enter(lease=0.1)
    store.let_pass(0.15)
    store.enter(holder="h2")
    store.continue_(holder="h2")
    store.release(holder="h2")
    before = store.record
    assert store.continue_(token="t3", holder="h1").code is Publish.DUPLICATE
    assert store.record == before


def test_what_was_continued_later_is_not_continued_from_before(store: Store) -> None:
    """A copy that is two attempts behind publishes nothing."""
    store.acquire()
    store.enter(attempt=2)
    assert store.continue_(attempt=1).code is Publish.DUPLICATE


def test_an_unknown_run_continues_what_nobody_else_continued(store: Store) -> None:
    """A run that was let in without the store can still retry."""
    store.acquire()
    assert store.continue_(holder="").code is Publish.CLAIMED
    assert store.record["next_attempt"] == "1"
    assert store.enter(attempt=1).code is Entry.ENTERED


def test_a_copy_whose_retry_is_only_being_published_can_come_back(store: Store) -> None:
    """Its process may have died before the retry was queued: then it alone is left to run."""
    store.acquire()
    store.enter(lease=0.1)
    store.continue_()
    store.let_pass(0.15)
    assert store.enter(holder="h2").code is Entry.ENTERED
    assert "next_attempt" not in store.record


def test_a_lapsed_claim_is_continued_anew(store: Store) -> None:
    """A run that outlived its claim takes the free key again."""
    ticket = store.continue_(ttl=45)
    assert (ticket.code, ticket.owner, ticket.seconds) == (Publish.CLAIMED, "one", 45)
    record = store.record
    assert (record["owner"], record["next_attempt"]) == ("one", "1")
    assert record["task"] == "shop.send_invoice"
    assert int(record["fence"]) == ticket.fence > 0
    assert store.lapses_in == pytest.approx(45, abs=2)


# -- release ---------------------------------------------------------------------------------


def test_the_holder_frees_the_claim(store: Store) -> None:
    """A task that has ended leaves nothing behind."""
    store.acquire()
    store.enter()
    assert store.release() == (Release.FREED, "one")
    assert store.server.keys("*") == []


def test_a_released_claim_cannot_be_released_again(store: Store) -> None:
    """A repeated release finds the key free, which is what it wanted."""
    store.acquire()
    store.enter()
    store.release()
    assert store.release() == (Release.LAPSED, "")


def test_another_tasks_claim_is_not_released(store: Store) -> None:
    """A task whose key went to another one does not free it."""
    store.acquire(owner="two")
    before = store.record
    assert store.release(may_be_unentered=True) == (Release.NOT_OURS, "two")
    assert store.record == before


def test_a_zombie_does_not_release_its_successor(store: Store) -> None:
    """Both carry the same headers; only the holder's token tells them apart."""
    store.acquire()
    store.enter(lease=0.1)
    store.let_pass(0.15)
    store.enter(holder="h2")
    before = store.record
    assert store.release(holder="h1") == (Release.NOT_OURS, "one")
    assert store.release(holder="h1", may_be_unentered=True) == (Release.NOT_OURS, "one")
    assert store.record == before


def test_a_run_that_published_a_retry_keeps_the_claim(store: Store) -> None:
    """The key stays taken for the retry, and nobody holds it until that starts."""
    store.acquire()
    store.enter(ttl=400)
    store.continue_(ttl=90)
    assert store.release() == (Release.KEPT, "one")
    record = store.record
    assert not {"holder", "holder_attempt", "lease_end", "next_attempt"} & record.keys()
    assert record["attempt"] == "1"
    assert store.lapses_in == pytest.approx(90, abs=2)


def test_a_release_of_a_continued_run_can_be_repeated(store: Store) -> None:
    """Repeated, it neither frees the retry's claim nor fails."""
    store.acquire()
    store.enter()
    store.continue_()
    store.release()
    before = store.record
    assert store.release()[0] is Release.NOT_OURS
    assert store.release(may_be_unentered=True) == (Release.KEPT, "one")
    assert store.record == before


def test_a_copy_that_goes_back_keeps_the_claim(store: Store) -> None:
    """A requeued copy finds the key free to enter, at once."""
    store.acquire()
    store.enter(lease=30, ttl=40)
    assert store.release(keep_for=100) == (Release.KEPT, "one")
    assert store.lapses_in == pytest.approx(100, abs=2)
    assert store.record["attempt"] == "0"
    assert store.enter(holder="h2").code is Entry.ENTERED


def test_a_copy_that_goes_back_forgets_the_retry_that_it_could_not_publish(store: Store) -> None:
    """It will run again, and is not taken for continued."""
    store.acquire()
    store.enter()
    store.continue_()
    assert store.release(keep_for=100)[0] is Release.KEPT
    assert store.record["attempt"] == "0"
    assert store.enter(holder="h2").code is Entry.ENTERED


def test_a_copy_that_goes_back_does_not_shorten_the_claim(store: Store) -> None:
    """An allowance that was longer stays."""
    store.acquire(ttl=500)
    store.enter(ttl=500)
    store.release(keep_for=100)
    assert store.lapses_in == pytest.approx(500, abs=2)


def test_only_the_holder_releases_by_default(store: Store) -> None:
    """A copy that was never let in frees nothing."""
    store.acquire()
    before = store.record
    assert store.release() == (Release.NOT_OURS, "one")
    assert store.record == before


def test_a_copy_that_never_started_is_released_for(store: Store) -> None:
    """A revoked or expired message frees the key that it has waited with."""
    store.acquire()
    assert store.release(holder="", may_be_unentered=True) == (Release.FREED, "one")
    assert store.record == {}


def test_a_copy_that_never_started_does_not_free_a_live_run(store: Store) -> None:
    """Neither does it where its twin runs."""
    store.acquire()
    store.enter()
    assert store.release(holder="h2", may_be_unentered=True)[0] is Release.NOT_OURS
    assert store.record["holder"] == "h1"


def test_a_copy_that_never_started_frees_a_dead_run(store: Store) -> None:
    """A run whose lease has ended does not count as one."""
    store.acquire()
    store.enter(lease=0.1)
    store.let_pass(0.15)
    assert store.release(holder="h2", may_be_unentered=True) == (Release.FREED, "one")


def test_what_was_continued_is_remembered_when_all_is_over(store: Store) -> None:
    """A copy of an earlier attempt that comes back late does not run on the free key."""
    store.acquire()
    store.enter()
    store.continue_()
    store.release()
    store.enter(attempt=1, holder="h2")
    assert store.release(attempt=1, holder="h2", remember=0.3)[0] is Release.FREED
    assert store.record == {}
    ticket = store.enter(holder="h3")
    assert (ticket.code, ticket.owner, ticket.seconds) == (Entry.CONTINUED, "one", 0)
    assert store.record == {}
    store.let_pass(0.35)
    assert store.enter(holder="h3").code is Entry.ENTERED


def test_a_memory_is_the_owners_alone(store: Store) -> None:
    """The key is free for everybody else; and the old copy is told so even when it is taken."""
    store.enter(attempt=1)
    store.release(attempt=1, remember=60)
    assert store.enter(owner="two", holder="h2").code is Entry.ENTERED
    assert store.enter(holder="h3").code is Entry.CONTINUED
    assert store.enter(attempt=1, holder="h4").code is Entry.CONTINUED
    assert store.enter(attempt=2, holder="h5").code is Entry.DUPLICATE


def test_a_task_that_was_never_continued_leaves_nothing(store: Store) -> None:
    """The common path writes no memory."""
    store.acquire()
    store.enter()
    store.release(remember=60)
    assert store.server.keys("*") == []


# -- abandon ---------------------------------------------------------------------------------


def test_a_call_that_was_not_published_gives_its_claim_back(store: Store) -> None:
    """The next call gets the key."""
    store.acquire()
    assert store.abandon()
    assert store.record == {}
    assert store.acquire(owner="two", token="t9").code is Publish.CLAIMED


def test_a_retry_that_was_not_published_is_taken_back(store: Store) -> None:
    """The run that wanted it can go back to the queue, and publish it again."""
    store.acquire()
    store.enter()
    store.continue_()
    assert store.abandon(token="t2")
    record = store.record
    assert (record["attempt"], record["holder"]) == ("0", "h1")
    assert not {"next_attempt", "token"} & record.keys()
    assert store.continue_(token="t3").code is Publish.CLAIMED


def test_abandoning_can_be_repeated(store: Store) -> None:
    """A second time there is nothing to take back."""
    store.acquire()
    assert store.abandon()
    assert not store.abandon()
    store.acquire()
    store.enter()
    store.continue_()
    assert store.abandon(token="t2")
    before = store.record
    assert not store.abandon(token="t2")
    assert store.record == before


@pytest.mark.parametrize(("owner", "token"), [("two", "t1"), ("one", "other")])
def test_a_stranger_abandons_nothing(store: Store, owner: str, token: str) -> None:
    """Owner and token must both be those of the publish that failed."""
    store.acquire()
    before = store.record
    assert not store.abandon(owner=owner, token=token)
    assert store.record == before


def test_a_call_that_has_started_was_published_after_all(store: Store) -> None:
    """A publish whose confirmation was lost does not free the key of the task that runs."""
    store.acquire()
    store.enter()
    assert not store.abandon()
    assert store.record["holder"] == "h1"


def test_a_retry_that_has_started_was_published_after_all(store: Store) -> None:
    """Nor does it turn the attempt back."""
    store.acquire()
    store.enter(lease=0.1)
    store.continue_()
    store.let_pass(0.15)
    store.enter(attempt=1, holder="h2")
    assert not store.abandon(token="t2")
    assert store.record["attempt"] == "1"


# -- fences, keys and listing ----------------------------------------------------------------


def test_a_fence_grows_each_time_a_claim_changes_hands(store: Store) -> None:
    """Also across a release, when the claim and its last fence are gone."""
    fences = []
    for round_ in range(3):
        fences.append(store.acquire(token=f"t{round_}").fence)
        fences.append(store.enter(lease=0.05).fence)
        store.let_pass(0.06)
        fences.append(store.enter(holder="h2").fence)
        assert store.release(holder="h2")[0] is Release.FREED
    fences.append(store.enter().fence)
    store.release()
    fences.append(store.continue_().fence)
    assert fences == sorted(set(fences))


def test_a_fence_grows_even_when_the_clock_stands_still(store: Store) -> None:
    """A takeover counts on from the fence before it where that is ahead of the clock."""
    store.acquire()
    store.server.hset(store.key, "fence", 9_000_000_000_000_000)
    assert store.enter().fence == 9_000_000_000_000_001


def test_claims_are_listed_by_key(store: Store) -> None:
    """All claims are found, and nothing else."""
    for number in range(3):
        store.claims.enter(
            f"task:{number}", owner="one", attempt=0, holder="h", lease=9, ttl=9, task="task"
        )
    store.server.set("reliable:other", "x")
    assert store.claims.names() == [f"reliable:claim:{{task:{n}}}" for n in range(3)]


@pytest.mark.parametrize("prefix", ["a*:", "[ab]?:", "back\\slash^:"])
def test_a_prefix_is_taken_literally(store: Store, prefix: str) -> None:
    """Characters that mean something to SCAN mean nothing in a prefix."""
    address = ServerAddress(store.address.url, 5.0, {"global_keyprefix": prefix})
    own = Claims(address, "reliable:")
    own.enter("task:1", owner="one", attempt=0, holder="h", lease=9, ttl=9, task="task")
    store.server.set("ab:reliable:claim:{task:2}", "not under the prefix")
    store.server.set("aa:reliable:claim:{task:3}", "not under the prefix")
    assert own.names() == [f"{prefix}reliable:claim:{{task:1}}"]
    assert own.read("task:1")["owner"] == "one"


def test_claims_of_two_prefixes_do_not_meet(store: Store) -> None:
    """Two apps that share a Redis and not a prefix share no claim."""
    store.acquire()
    other = Claims(ServerAddress(store.address.url, 5.0, {"global_keyprefix": "b:"}), "reliable:")
    assert other.read(NAME) == {}
    assert other.names() == []
