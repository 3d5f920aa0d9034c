"""Dead letters of real workers: what is kept, and what comes of replaying it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import redis
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult

from reliable_tasks import (
    DeadLetterNotFound,
    ReliableResult,
    ReplayRefused,
    RequeuesExhausted,
    StoreUnavailable,
    dead_letters,
)
from reliable_tasks._celery.queues import dead_queue
from reliable_tasks._places import dead_place
from reliable_tasks._store.dead import DeadStore
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import poison
from tests.integration.conftest import BROKERS, StartScene, on_all_brokers, other_database
from tests.integration.scene import Scene
from tests.support import Proxy, wait_until


@pytest.fixture
def scene(scene: Scene) -> Scene:
    """The app of failures with a worker."""
    scene.worker(concurrency=2)
    return scene


def wait_dead(scene: Scene, count: int = 1, **which: Any) -> list[dead_letters.DeadLetter]:
    """Wait until there are so many dead letters, and return them, the newest first."""
    wait_until(
        lambda: dead_letters.count(app=scene.app, **which) >= count,
        20,
        lambda: f"{count} dead letters\n{scene.logs}",
    )
    found = list(dead_letters.list(app=scene.app, **which))
    assert len(found) == count, scene.logs
    return found


def mend(scene: Scene, name: str) -> None:
    """Have the task of a name succeed from now on."""
    scene.journal.write("mended", name=name)


def replayed(scene: Scene, letter: dead_letters.DeadLetter, **options: Any) -> ReliableResult:
    """Replay a letter, and return the new task's result."""
    new_id = dead_letters.replay(letter.id, app=scene.app, **options)
    result: ReliableResult = scene.app.tasks[letter.task].AsyncResult(new_id)
    return result


# -- what is kept ----------------------------------------------------------------------------


@on_all_brokers
@pytest.mark.parametrize(
    ("task", "cause", "error", "retries"),
    [
        ("fail", "failed", "ValueError: order is broken", 0),
        ("fail_again", "retries", "KeyError: 'order'", 2),
        ("slow", "time_limit", "TimeLimitExceeded", 0),
        ("dropped", "rejected", "Reject", 0),
        ("dropped_oddly", "rejected", "0 of tea", 0),
    ],
)
def test_a_task_that_fails_for_good_is_kept_whole(
    scene: Scene, task: str, cause: str, error: str, retries: int
) -> None:
    """What it was called with, what it failed of, and how often it was tried."""
    result = scene.call(task, "order", headers={"tenant": "blue"}, priority=3)
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.task_id, letter.task) == (result.id, result.id, task)
    assert (letter.cause, letter.retries) == (cause, retries)
    assert error in letter.error
    assert letter.argsrepr == "('order',)"
    assert (letter.queue, letter.priority, letter.root_id) == ("celery", 3, result.id)
    assert letter.worker == scene.workers[0].hostname
    full = dead_letters.get(letter.id, app=scene.app)
    assert full.traceback
    message = json.loads(dead_letters.message(letter.id, app=scene.app))
    assert message["body"][0] == ["order"]
    assert message["headers"]["tenant"] == "blue"
    assert result.state == "FAILURE"
    if task == "fail_again":
        assert letter.first_at < letter.at


@on_all_brokers
def test_a_task_that_puts_itself_back_without_end_is_stopped(
    scene: Scene, request: pytest.FixtureRequest
) -> None:
    """It has a budget and pauses that grow, and ends in its child with its handlers."""
    is_ours = request.node.callspec.params["scene"] == BROKERS[0]
    result = scene.call("requeue", "order")
    with pytest.raises(RequeuesExhausted) as caught:
        result.get(timeout=40)
    assert (caught.value.requeues, caught.value.limit) == (4, 3)
    starts = [event.at for event in scene.journal.events("start", name="order")]
    assert len(starts) == 4
    # On ours at once, after 1 s and after 2 s; the sweeper looks each second.
    assert not is_ours or starts[1] - starts[0] < 1
    assert starts[2] - starts[1] >= 0.9
    assert starts[3] - starts[2] >= 1.8
    (letter,) = wait_dead(scene)
    assert letter.cause == "requeues"


@on_all_brokers
def test_a_message_of_an_unknown_task_is_kept(scene: Scene) -> None:
    """Celery drops it; here it can be replayed once a worker knows it."""
    result = scene.send("shop.gone", 1, 2)
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.task, letter.cause) == (result.id, "shop.gone", "unknown_task")
    assert json.loads(dead_letters.message(letter.id, app=scene.app))["body"][0] == [1, 2]
    assert scene.call("innocent", "later").get(timeout=10) == "later"


@on_all_brokers
def test_a_message_that_cannot_be_decoded_is_kept(scene: Scene) -> None:
    """Its body is kept as it is, and its replay is refused with the reason."""
    scene.send_garbage("innocent", "garbage")
    (letter,) = wait_dead(scene)
    assert letter.cause == "undecodable"
    with pytest.raises(ReplayRefused, match="cannot be read"):
        dead_letters.replay(letter.id, app=scene.app)
    assert scene.call("innocent", "later").get(timeout=10) == "later"


@on_all_brokers
def test_an_expired_task_is_kept_if_asked(scene: Scene) -> None:
    """Not by default: it has not failed."""
    task = scene.app.tasks["innocent"]
    called = task.apply_async(("late",), expires=-1)
    with pytest.raises(TaskRevokedError):
        called.get(timeout=10)
    asked = scene.app.tasks["perishable"].apply_async(("late",), expires=-1)
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.cause) == (asked.id, "expired")
    assert replayed(scene, letter).get(timeout=20) == "late"
    assert asked.state == "REVOKED"
    hasty = scene.app.tasks["hasty_perishable"].apply_async(("late",), expires=-1)
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.cause) == (hasty.id, "expired")


def test_a_task_that_is_not_to_be_kept_is_not(scene: Scene) -> None:
    """Nor what it calls expected, which is no failure."""
    for name in ("careless", "expecting"):
        with pytest.raises(ValueError, match="expected"):
            scene.call(name).get(timeout=10)
    with pytest.raises(LookupError, match="0 of tea"):
        scene.call("expecting_odd").get(timeout=10)
    # One after the other they are told to the worker, so those are over.
    scene.call("fail", "order")
    (letter,) = wait_dead(scene)
    assert letter.task == "fail"


def test_an_early_ack_is_kept_afterwards(scene: Scene) -> None:
    """Its message is gone when it starts; what it was is kept when it has failed."""
    result = scene.call("hasty", "order")
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.cause) == (result.id, "failed")
    mend(scene, "order")
    assert replayed(scene, letter).get(timeout=20) == "order"


def test_what_must_not_be_read_is_not_kept_readable(
    scenes: StartScene, redis_server: EmbeddedServer
) -> None:
    """The message is whole all the same; and a function that fails hides all."""
    settings = {"reliable_dead_letter_redact": "tests.integration.apps.poison:redact"}
    backend = other_database(redis_server)
    scene = scenes(redis_server.url, backend, module=poison, settings=settings)
    scene.worker(concurrency=2)
    scene.call("fail", "card 4111")
    (letter,) = wait_dead(scene)
    assert letter.argsrepr == "('card ****',)"
    assert "4111" in dead_letters.message(letter.id, app=scene.app)
    scene.call("fail", "unreadable")
    hidden, _ = wait_dead(scene, 2)
    assert hidden.argsrepr == hidden.error == "(not redacted)"


def test_rabbitmq_keeps_none_of_them_twice(
    scenes: StartScene, rabbitmq_url: str, redis_url: str
) -> None:
    """What is rejected is a dead letter in the Redis, and so not in the queue of dropped ones."""
    scene = scenes(rabbitmq_url, redis_url, module=poison)
    scene.worker(concurrency=2)
    scene.call("dropped", "order")
    scene.send("shop.gone", 1)
    wait_dead(scene, 2)
    with scene.app.connection_for_read() as connection:
        queue = dead_queue()(connection.default_channel)
        assert queue.queue_declare(passive=True).message_count == 0


#: RabbitMQ drops what is rejected of such a queue.
REJECTED_OF_CLASSIC_QUEUE = {
    "task_default_queue_type": "classic",
    "task_create_missing_queue_type": "classic",
    "task_default_exchange_type": "direct",
    "task_acks_on_failure_or_timeout": False,
}


@pytest.mark.parametrize(
    "more", [{}, REJECTED_OF_CLASSIC_QUEUE], ids=["acknowledged", "rejected of a classic queue"]
)
def test_a_letter_waits_for_the_redis_that_keeps_it(
    scenes: StartScene,
    rabbitmq_url: str,
    redis_server: EmbeddedServer,
    redis_proxy: Proxy,
    more: dict[str, Any],
) -> None:
    """Its message is not ended before, so a worker that dies meanwhile loses nothing."""
    settings = {"reliable_redis_url": f"redis://127.0.0.1:{redis_proxy.port}/0", **more}
    backend = other_database(redis_server)
    scene = scenes(rabbitmq_url, backend, module=poison, settings=settings)
    worker = scene.worker(concurrency=1)
    result = scene.call("fail_at", "order", "gate")
    scene.wait_starts("order")
    redis_proxy.refuse()
    scene.journal.open("gate")
    wait_until(lambda: result.state == "FAILURE", 15, lambda: scene.logs)
    worker.wait_log("cannot be told now", timeout=15)
    worker.kill_group()
    redis_proxy.heal()
    mend(scene, "nothing")
    scene.worker(concurrency=1)
    (letter,) = wait_dead(scene)
    assert (letter.id, letter.cause) == (result.id, "failed")


# -- replay ----------------------------------------------------------------------------------


@on_all_brokers
def test_a_replay_is_the_same_task_under_a_new_id(scene: Scene) -> None:
    """Its arguments and headers are as they were; the old result points to the new task."""
    result = scene.call("fail_again", "order", headers={"tenant": "blue"})
    (letter,) = wait_dead(scene)
    assert result.replayed_id is None
    mend(scene, "order")
    again = replayed(scene, letter)
    assert again.id != result.id
    assert again.get(timeout=20) == "order"
    assert result.state == "FAILURE"
    assert result.replayed_id == again.id
    start = scene.journal.events("start", name="order")[-1]
    assert (start.data["id"], start.data["retries"]) == (again.id, 0)
    assert dead_letters.count(app=scene.app) == 0
    (done,) = dead_letters.list(app=scene.app, replayed=True)
    assert (done.id, done.replayed_as) == (letter.id, again.id)


def test_a_replay_that_fails_is_another_dead_letter(scene: Scene) -> None:
    """Nothing of it is lost: it knows which one it is the replay of."""
    scene.call("fail", "order")
    (letter,) = wait_dead(scene)
    again = replayed(scene, letter)
    with pytest.raises(ValueError, match="order is broken"):
        again.get(timeout=20)
    (second,) = wait_dead(scene)
    assert second.id == again.id
    message = json.loads(dead_letters.message(second.id, app=scene.app))
    assert message["headers"]["reliable-replay-of"] == letter.id
    assert second.root_id == letter.root_id


@on_all_brokers
def test_many_who_replay_one_letter_send_it_once(scene: Scene) -> None:
    """All of them get the id of the first one, also those that come later."""
    scene.call("fail", "order")
    (letter,) = wait_dead(scene)
    mend(scene, "order")
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(dead_letters.replay(letter.id, app=scene.app)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids.append(dead_letters.replay(letter.id, app=scene.app))
    assert len(ids) == 9
    assert len(set(ids)) == 1
    scene.app.AsyncResult(ids[0]).get(timeout=20)
    assert len(scene.journal.events("start", id=ids[0])) == 1


@on_all_brokers
def test_the_rest_of_a_chain_runs_when_a_member_is_replayed(scene: Scene) -> None:
    """With its callbacks, and on the value that the member returns now."""
    tasks = scene.app.tasks
    first = tasks["add"].s("order", 1, other=2).set(link=tasks["note"].s("linked"))
    called = chain(first, tasks["note"].s("chained")).apply_async()
    (letter,) = wait_dead(scene)
    mend(scene, "order")
    assert replayed(scene, letter).get(timeout=20) == 3
    wait_until(lambda: len(scene.journal.events("note")) == 2, 20, lambda: scene.logs)
    noted = {tuple(event.data["values"]) for event in scene.journal.events("note")}
    assert noted == {("3", "'linked'"), ("3", "'chained'")}
    assert called.parent.id == letter.id


@on_all_brokers
def test_a_group_member_that_is_replayed_succeeds(scene: Scene) -> None:
    """The group's other results are as they were."""
    add = scene.app.tasks["add"]
    mend(scene, "well")
    called: GroupResult = group(add.s("well", 1), add.s("ill", 2)).apply_async()
    (letter,) = wait_dead(scene)
    assert letter.group_id == called.id
    mend(scene, "ill")
    again = replayed(scene, letter)
    assert again.get(timeout=20) == 3
    assert again.state == "SUCCESS"
    assert called.results[0].get(timeout=10) == 2


@on_all_brokers
def test_a_chord_is_replayed_as_a_whole(scene: Scene) -> None:
    """Its failure was counted, so a member alone is refused; the whole chord completes."""
    tasks = scene.app.tasks
    for name in ("one", "three"):
        mend(scene, name)
    header = [
        tasks["add"].s("one", 1),
        tasks["add"].s("two", 2),
        chain(tasks["add"].s("three", 3), tasks["add"].s("ill", 4).set(immutable=True)),
        tasks["add"].s("four", 4),
    ]
    mend(scene, "four")
    called = chord(header)(tasks["total"].s())
    with pytest.raises((ChordError, ValueError), match="broken"):
        called.get(timeout=20)
    letters = wait_dead(scene, 2, task="add")
    two = next(one for one in letters if "two" in one.argsrepr)
    with pytest.raises(ReplayRefused, match=str(two.chord_id)) as caught:
        dead_letters.replay(two.id, app=scene.app)
    assert "whole_chord=True" in caught.value.reason
    mend(scene, "two")
    mend(scene, "ill")
    place = dead_place(scene.app)
    assert place is not None
    group_id = str(two.chord_id)
    # A worker keeps a part a moment after the child has told the chord of it.
    wait_until(lambda: len(place.store.parts(place.server, group_id)[1]) == 4, 10)
    again = replayed(scene, two, whole_chord=True)
    # Celery 5.6 does not hear of one that is ready before it is asked for, after another's error.
    wait_until(again.ready, 20, lambda: scene.logs)
    assert again.result == 3
    (total,) = wait_until(
        lambda: scene.journal.events("total"), 30, lambda: f"the chord's body\n{scene.logs}"
    )
    assert total.data["numbers"] == [2, 3, 5, 5]
    # Both are replayed by it, and neither twice.
    assert dead_letters.count(app=scene.app, task="add") == 0
    for letter in letters:
        found = dead_letters.replay(letter.id, app=scene.app, whole_chord=True)
        assert scene.app.AsyncResult(found).result in (3, 5)
    assert len(scene.journal.events("total")) == 1
    assert place.store.parts(place.server, group_id) == (0, {})


@on_all_brokers
def test_a_part_that_its_worker_did_not_know_is_replayed_alone(scene: Scene) -> None:
    """Celery tells no chord of it, which waits, and is called when the part has succeeded."""
    tasks = scene.app.tasks
    mend(scene, "one")
    header = [tasks["add"].s("one", 1), scene.app.signature("deployed", (40,))]
    called = chord(header, app=scene.app)(tasks["total"].s())
    (letter,) = wait_dead(scene)
    assert letter.cause == "unknown_task"
    scene.workers[0].stop()
    mend(scene, "deployed")
    scene.worker(concurrency=2)
    dead_letters.replay(letter.id, app=scene.app)
    # Asked by its own id: Celery's result of a chord would raise what its parts have ended with.
    assert scene.app.AsyncResult(called.id).get(timeout=20) == 42


def test_a_chord_that_completes_leaves_nothing(scene: Scene) -> None:
    """The messages of its parts are kept for as long as one of them may die."""
    tasks = scene.app.tasks
    for name in ("one", "two"):
        mend(scene, name)
    body = chord([tasks["add"].s("one", 1), tasks["add"].s("two", 2)])(tasks["total"].s())
    assert body.get(timeout=20) == 5
    wait_until(
        lambda: not scene.claims.client.redis.keys("reliable:dead:*"), 10, lambda: scene.logs
    )


@on_all_brokers
def test_a_replay_claims_its_key_as_a_call_does(scene: Scene) -> None:
    """Another task has it: the replay is refused, and can be tried again."""
    scene.call("crash_once", "order", "sigkill")
    (letter,) = wait_dead(scene)
    assert letter.claim
    scene.workers[0].stop()
    other = scene.call("crash_once", "order", "sigkill")
    assert not other.duplicate
    with pytest.raises(ReplayRefused, match=other.id):
        dead_letters.replay(letter.id, app=scene.app)
    assert dead_letters.count(app=scene.app) == 1
    args = ("order", "sigkill")
    fence = scene.claim(*args, task="crash_once")["fence"]
    scene.claims.free(scene.claim_name(*args, task="crash_once"), owner=other.id, fence=fence)
    again = replayed(scene, letter)
    assert scene.claim(*args, task="crash_once")["owner"] == again.id


@on_all_brokers
def test_a_replay_that_is_sent_again_leaves_no_claim(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could note that it was sent, and its task has ended: the copy is not run."""
    scene.call("fail_keyed", "order")
    (letter,) = wait_dead(scene)
    mend(scene, "order")
    place = dead_place(scene.app)
    assert place is not None

    def away(*args: Any) -> None:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(DeadStore, "release", away)
        with pytest.raises(StoreUnavailable):
            dead_letters.replay(letter.id, app=scene.app)
    (first,) = wait_until(lambda: scene.journal.events("start", name="order")[1:], 20)
    scene.wait_free("order", task="fail_keyed")
    # Nobody waits for whoever did not say how it went.
    place.server.hset(place.store.keys.dead_letter(letter.id), "replay_until", 0)
    assert dead_letters.replay(letter.id, app=scene.app) == first.data["id"]
    scene.call("innocent", "after").get(timeout=20)
    scene.wait_free("order", task="fail_keyed")
    assert scene.starts("order") == 2
    assert not scene.call("fail_keyed", "order").duplicate


def test_many_are_replayed_by_what_they_are(scene: Scene) -> None:
    """The oldest first, at a rate, and those that cannot be are named."""
    for name in ("a", "b", "c"):
        scene.call("fail", name)
        wait_dead(scene, "abc".index(name) + 1)
        mend(scene, name)
    scene.send("shop.gone", 1)
    wait_dead(scene, 4)
    outcome = dead_letters.replay_all(
        lambda letter: "c" not in letter.argsrepr, task="fail", rate=4, app=scene.app
    )
    assert len(outcome.sent) == 2
    assert not outcome.refused
    for new_id in outcome.sent.values():
        scene.app.AsyncResult(new_id).get(timeout=20)
    assert {one.argsrepr for one in dead_letters.list(app=scene.app)} == {"('c',)", "(1,)"}
    assert dead_letters.purge(cause="unknown_task", app=scene.app) == 1
    (left,) = dead_letters.list(app=scene.app)
    dead_letters.discard(left.id, app=scene.app)
    with pytest.raises(DeadLetterNotFound):
        dead_letters.get(left.id, app=scene.app)
