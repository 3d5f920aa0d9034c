"""A claim from its call to its end, whichever way the task ends, in a real worker."""

from __future__ import annotations

from uuid import uuid4

import pytest
from celery import chain, group
from celery.exceptions import (
    NotRegistered,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
)

from reliable_tasks import DuplicateTaskError, FollowTimeout
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

#: A queue that no worker reads.
PARKED = "parked"


@pytest.fixture(scope="module")
def shop(module_redis: EmbeddedServer, module_scenes: StartScene) -> Scene:
    """One prefork worker with two children, shared by the module's tests."""
    # Celery notices the death of a child that took a dead one's place only when it looks, each
    # 5 s; a shorter hard limit would strike first.
    scene = module_scenes(module_redis.url, other_database(module_redis), limit=8)
    scene.worker(concurrency=2)
    return scene


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for each name is one `@once` key."""
    return uuid4().hex[:8]


def test_a_queued_task_holds_its_key(shop: Scene, name: str) -> None:
    """From the call on the key has an owner, but no holder, and a ttl in which it lapses."""
    result = shop.call("act", name, queue=PARKED)
    claim = shop.claim(name)
    assert (claim["owner"], claim["attempt"], claim["task"]) == (result.id, "0", "act")
    assert "holder" not in claim
    (key,) = (key for key in shop.claims.names() if name in key)
    assert 3590 < shop.claims.client.redis.ttl(key) <= 3600


def test_a_countdown_adds_to_the_time_that_a_claim_lives(shop: Scene, name: str) -> None:
    """A task that waits for its time keeps its key until then."""
    shop.call("act", name, queue=PARKED, countdown=500)
    (key,) = (key for key in shop.claims.names() if name in key)
    assert 4090 < shop.claims.client.redis.ttl(key) <= 4100


def test_a_running_task_is_the_holder_of_its_key(shop: Scene, name: str) -> None:
    """The copy that runs is named in the claim until it ends."""
    result = shop.call("act", name, "wait")
    shop.wait_starts(name)
    claim = shop.claim(name)
    assert claim["owner"] == result.id
    assert claim["holder"]
    assert claim["holder_attempt"] == "0"
    shop.journal.open(name)
    assert result.get(timeout=10) == name
    shop.wait_free(name)


@pytest.mark.parametrize(
    ("what", "starts"),
    [
        pytest.param("succeed", 1, id="success"),
        pytest.param("retry", 2, id="self.retry at once"),
        pytest.param("retry_later", 2, id="self.retry with a countdown"),
        pytest.param("requeue", 2, id="Reject with requeue"),
        pytest.param("replace_same", 2, id="self.replace with the same key"),
        pytest.param("replace_other", 1, id="self.replace with another key"),
        pytest.param("die", 2, id="child killed"),
    ],
)
def test_a_task_that_succeeds_in_the_end_frees_its_key(
    shop: Scene, name: str, what: str, starts: int
) -> None:
    """However a task gets to its end, it runs no more often than it must and leaves no claim."""
    result = shop.call("act", name, what)
    assert result.get(timeout=15).startswith(name)
    shop.wait_free(name, what)
    shop.wait_free(f"{name}, again")
    events = shop.journal.events("start", name=name)
    assert len(events) == starts, shop.logs
    assert {event.data["id"] for event in events} == {result.id}
    again = shop.call("act", name)
    assert not again.duplicate
    assert again.get(timeout=10) == name
    shop.wait_free(name)
    assert shop.starts(name) == starts + 1, shop.logs


def test_a_child_killed_after_it_published_its_retry(shop: Scene, name: str) -> None:
    """Its attempt may run again before the retry, but not once the retry has started."""
    result = shop.call("act", name, "retry_and_die")
    # The death is noticed within 5 s, and the retry looks every 5 s for the end of its attempt.
    assert result.get(timeout=30).startswith(name)
    shop.wait_free(name)
    attempts = [event.data["attempt"] for event in shop.journal.events("start", name=name)]
    assert attempts == sorted(attempts), shop.logs
    assert attempts[-1] == 1, shop.logs


def test_the_replacement_with_another_key_runs_under_the_same_id(shop: Scene, name: str) -> None:
    """It is another call, with a claim of its own, and the old key is free while it runs."""
    result = shop.call("act", name, "replace_other")
    assert result.get(timeout=10) == f"{name}, again"
    (event,) = shop.journal.events("start", name=f"{name}, again")
    assert event.data["id"] == result.id


def test_the_attempts_of_a_retry_policy_share_one_claim(shop: Scene, name: str) -> None:
    """Between two attempts the key stays taken, and no holder is named."""
    result = shop.call("flaky", name, 2)
    wait_until(lambda: len(shop.journal.events("end", name=name)) == 2)
    between = wait_until(
        lambda: "holder" not in (claim := shop.claim(name, 2, task="flaky")) and claim
    )
    assert (between["owner"], between["attempt"]) == (result.id, "2")
    assert shop.call("flaky", name, 2).duplicate
    assert result.get(timeout=10) == 2
    shop.wait_free(name, 2, task="flaky")
    assert shop.starts(name) == 3


@pytest.mark.parametrize(
    ("what", "limits", "error"),
    [
        pytest.param("fail", {}, ValueError, id="error"),
        pytest.param("sleep", {"soft_time_limit": 1}, SoftTimeLimitExceeded, id="soft time limit"),
        pytest.param(
            "sleep_on",
            {"soft_time_limit": 1, "time_limit": 2},
            TimeLimitExceeded,
            id="hard time limit",
        ),
    ],
)
def test_a_task_that_fails_frees_its_key(
    shop: Scene, name: str, what: str, limits: dict[str, int], error: type[Exception]
) -> None:
    """A failure is a final state: it is not run again and leaves no claim."""
    result = shop.call("act", name, what, **limits)
    with pytest.raises(error):
        result.get(timeout=15)
    shop.wait_free(name, what)
    assert not shop.call("act", name).duplicate
    shop.wait_starts(name, 2)
    shop.wait_free(name)
    assert shop.starts(name) == 2


@pytest.mark.parametrize("what", ["ignore", "reject"])
def test_a_task_that_wants_no_result_frees_its_key(shop: Scene, name: str, what: str) -> None:
    """Ignore and Reject without requeue end the task for good."""
    result = shop.call("act", name, what)
    shop.wait_starts(name)
    shop.wait_free(name, what)
    ends_as = {"reject": "FAILURE", "ignore": "STARTED"}[what]
    wait_until(lambda: result.state == ends_as)
    assert not shop.call("act", name).duplicate
    shop.wait_starts(name, 2)
    shop.wait_free(name)


def test_a_task_revoked_before_it_starts_frees_its_key(shop: Scene, name: str) -> None:
    """The worker that finds the task revoked gives its key back."""
    result = shop.call("act", name, countdown=1)
    shop.app.control.revoke(result.id)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=10)
    shop.wait_free(name)
    assert shop.starts(name) == 0


def test_a_task_that_expires_frees_its_key(shop: Scene, name: str) -> None:
    """The worker that finds the task expired gives its key back."""
    result = shop.call("act", name, countdown=1, expires=0.3)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=10)
    shop.wait_free(name)
    assert shop.starts(name) == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_task_terminated_while_it_runs_frees_its_key(shop: Scene, name: str, how: str) -> None:
    """revoke(terminate=True) ends the task for good, and its claim."""
    result = shop.call("act", name, "sleep")
    shop.wait_starts(name)
    result.revoke(terminate=True, signal=how)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=10)
    shop.wait_free(name, "sleep")
    assert shop.starts(name) == 1


def test_a_duplicate_gets_the_owners_result(shop: Scene, name: str) -> None:
    """While the task is queued or runs a call queues nothing; afterwards it is a new one."""
    first = shop.call("act", name, "wait", countdown=0.5)
    while_queued = shop.call("act", name, "wait")
    shop.wait_starts(name)
    while_running = shop.call("act", name, "wait")
    shop.journal.open(name)
    for again in (while_queued, while_running):
        assert again.duplicate
        assert again.id == first.id
        assert again.get(timeout=10) == name
    shop.wait_free(name)
    afterwards = shop.call("act", name, "wait")
    assert not afterwards.duplicate
    assert afterwards.get(timeout=10) == name
    assert shop.starts(name) == 2


def test_a_duplicates_own_task_id_is_named_on_its_result(shop: Scene, name: str) -> None:
    """No task has the id that the caller of a duplicate asked for, and the result says so."""
    first = shop.call("act", name, queue=PARKED)
    own = str(uuid4())
    again = shop.call("act", name, queue=PARKED, task_id=own)
    assert (again.id, again.ignored_id) == (first.id, own)
    same = shop.call("act", name, queue=PARKED, task_id=first.id)
    assert same.duplicate


def test_a_strict_duplicate_raises(shop: Scene, name: str) -> None:
    """With on_conflict="raise" the caller learns who owns the key, and for how long."""
    # Once a worker has it, the key lives on its lease.
    first = shop.call("strict", name, queue=name)
    with pytest.raises(DuplicateTaskError) as caught:
        shop.call("strict", name)
    assert caught.value.owner == first.id
    assert name in caught.value.key
    assert 0 < caught.value.expires_in <= 3600
    shop.release(name)
    shop.journal.open(name)
    assert first.get(timeout=10) == name
    shop.wait_free(name, task="strict")


def test_a_task_sent_by_name_takes_its_key_when_it_starts(shop: Scene, name: str) -> None:
    """send_task knows nothing of `@once`: the worker claims, and a duplicate by name follows."""
    first = shop.send("act", name, "wait")
    shop.wait_starts(name)
    assert shop.claim(name)["owner"] == first.id
    by_name = shop.send("act", name, "wait")
    by_task = shop.call("act", name, "wait")
    assert by_task.duplicate
    assert by_task.id == first.id
    shop.wait_followed(first.id)
    shop.journal.open(name)
    assert (first.get(timeout=10), by_name.get(timeout=10)) == (name, name)
    shop.wait_free(name)
    assert shop.starts(name) == 1


def test_a_task_sent_by_name_and_killed_runs_again(shop: Scene, name: str) -> None:
    """A claim that only the worker knows of is entered by its own redelivered message."""
    result = shop.send("act", name, "die")
    assert result.get(timeout=15) == name
    shop.wait_free(name)
    assert shop.starts(name) == 2


def test_chains_and_groups_claim_for_each_of_their_tasks(shop: Scene, name: str) -> None:
    """Canvas publishes through apply_async, so each task holds its key and frees it."""
    act = shop.app.tasks["act"]
    done = chain(act.si(f"{name}-1"), act.si(f"{name}-2")).apply_async()
    assert done.get(timeout=10) == f"{name}-2"
    both = group(act.si(f"{name}-3"), act.si(f"{name}-4")).apply_async()
    assert both.get(timeout=10) == [f"{name}-3", f"{name}-4"]
    for number in (1, 2, 3, 4):
        assert shop.starts(f"{name}-{number}") == 1
        shop.wait_free(f"{name}-{number}")


def test_an_older_message_whose_claim_lapsed_is_not_run_beside_a_newer(
    shop: Scene, name: str
) -> None:
    """A key that lapsed in a long queue and was taken by another call belongs to that call.

    The older one follows it, for its ttl.
    """
    older = shop.call("brief", name, queue=name)
    shop.wait_free(name, task="brief")
    newer = shop.call("brief", name)
    assert not newer.duplicate
    shop.wait_starts(name)
    shop.release(name)
    with pytest.raises(FollowTimeout) as caught:
        older.get(timeout=10)
    assert caught.value.owner == newer.id
    shop.journal.open(name)
    assert newer.get(timeout=10) == name
    shop.wait_free(name, task="brief")
    assert shop.starts(name) == 1


def test_a_message_whose_claim_lapsed_takes_the_key_again(shop: Scene, name: str) -> None:
    """A key that lapsed in a long queue and that nobody took is taken at the start."""
    result = shop.call("brief", name, queue=name)
    shop.wait_free(name, task="brief")
    shop.release(name)
    shop.wait_starts(name)
    assert shop.claim(name, task="brief")["owner"] == result.id
    shop.journal.open(name)
    assert result.get(timeout=10) == name
    shop.wait_free(name, task="brief")


def test_an_unknown_task_is_discarded_without_a_trace(shop: Scene) -> None:
    """A worker that does not know the task at all says so, and claims nothing."""
    before = set(shop.claims.names())
    result = shop.send("no such task")
    with pytest.raises(NotRegistered):
        result.get(timeout=10)
    assert set(shop.claims.names()) <= before
