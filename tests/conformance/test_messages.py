"""Messages on lease: every answer of every script, and what it leaves behind."""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
from kombu.transport.redis import PrefixedStrictRedis

from reliable_tasks._store.claims import Claims
from reliable_tasks._store.client import ServerAddress
from reliable_tasks._store.delivery import Delivery, Guard, Thrown
from reliable_tasks._store.messages import Messages
from reliable_tasks._store.publication import (
    ClaimTaken,
    Publication,
    Published,
    Queued,
    Superseded,
    publication_of,
    publishing,
)
from reliable_tasks._store.scripts import load
from tests.conformance.broker import BOUNDS, Broker, list_of, message, task_ids

FullBroker = tuple[Broker, Callable[[], None]]
#: What redis-py calls a refusal for want of memory.
OOM = pytest.raises(redis.exceptions.ResponseError, match=r"OOM|maxmemory")


def put(broker: Broker, *ids: str, queue: str = "celery", priority: int = 0) -> None:
    """Queue messages, and silence the bell."""
    for task_id in ids:
        assert broker.publish(task_id, queue, priority=priority).code is Queued.QUEUED
    broker.silence(queue)


def taken(broker: Broker, task_id: str = "one", worker: str = "w1", **options: Any) -> Delivery:
    """Queue one message and take it."""
    put(broker, task_id)
    return broker.fetch_one(worker, **options)


def taken_over(broker: Broker) -> tuple[Delivery, Delivery]:
    """A delivery whose lease has ended, and the one that has its message now."""
    zombie = taken(broker)
    broker.end_lease(zombie)
    assert broker.sweep() == 1
    return zombie, broker.fetch_one("w2")


def everything(broker: Broker) -> dict[bytes, Any]:
    """All that the server has, but for what lapses."""
    return {key: broker.server.dump(key) for key in broker.server.scan_iter()}


# -- fetch: which ----------------------------------------------------------------------------


def test_messages_are_taken_in_their_order(broker: Broker) -> None:
    """First in, first out; no more than asked for."""
    put(broker, "one", "two", "three")
    assert task_ids(broker.fetch(count=2)) == ["one", "two"]
    assert task_ids(broker.fetch(count=2)) == ["three"]
    assert broker.fetch() == []


def test_a_higher_priority_goes_first_in_all_queues(broker: Broker) -> None:
    """kombu's priority 0 is the first: of every queue, before the next of any."""
    put(broker, "late", queue="first", priority=3)
    put(broker, "later", queue="second", priority=3)
    put(broker, "soon", queue="second")
    put(broker, "now", queue="first")
    deliveries = broker.fetch(queues=("first", "second"))
    assert task_ids(deliveries) == ["now", "soon", "late", "later"]
    assert [d.queue for d in deliveries] == ["first", "second", "first", "second"]
    assert [d.list for d in deliveries] == [
        "first",
        "second",
        list_of("first", 3),
        list_of("second", 3),
    ]


def test_without_rotation_the_first_queue_is_emptied_first(broker: Broker) -> None:
    """The order in which the queues were named counts."""
    put(broker, "a1", "a2", queue="a")
    put(broker, "b1", "b2", queue="b")
    assert task_ids(broker.fetch(queues=("b", "a"), count=3)) == ["b1", "b2", "a1"]


def test_with_rotation_the_queues_are_served_in_turn(broker: Broker) -> None:
    """None starves behind one that is always full."""
    put(broker, "a1", "a2", "a3", queue="a")
    put(broker, "b1", queue="b")
    put(broker, "c1", "c2", queue="c")
    found = task_ids(broker.fetch(queues=("a", "b", "c"), rotates=True))
    assert found == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_rotation_does_not_beat_priority(broker: Broker) -> None:
    """Turns are taken within a priority."""
    put(broker, "a1", "a2", queue="a")
    put(broker, "b-late", queue="b", priority=3)
    assert task_ids(broker.fetch(queues=("a", "b"), rotates=True)) == ["a1", "a2", "b-late"]


def test_an_empty_fetch_leaves_nothing_behind(broker: Broker) -> None:
    """A worker that looks and finds nothing writes nothing."""
    assert broker.fetch(queues=("a", "b")) == []
    assert everything(broker) == {}


# -- fetch: what is recorded -----------------------------------------------------------------


def test_a_delivery_is_recorded_as_stock_kombu_does(broker: Broker) -> None:
    """A stock worker can read the entry, and finds it due only after the lease."""
    (raw,) = [message(queue="a:b")]
    broker.publish(queue="a:b", raw=raw)
    delivery = broker.fetch_one(queues=("a:b",), lease=30)
    assert broker.unacked == {delivery.tag: [json.loads(raw), "", "a:b"]}
    assert broker.index == {delivery.tag: pytest.approx(broker.now() + 30, abs=2)}
    assert broker.leases == {delivery.tag: pytest.approx(broker.now() + 30, abs=2)}
    assert delivery.raw == raw.encode()
    assert delivery.tag == "w1:1:1:a:b"
    assert broker.run_of() == {"tag": delivery.tag}
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(7 * 86400, abs=5)


def test_each_delivery_has_its_own_tag(broker: Broker) -> None:
    """Also of the same message."""
    put(broker, "one", "two")
    first = broker.fetch()
    for delivery in first:
        assert broker.requeue(delivery)
    second = broker.fetch()
    assert len({delivery.tag for delivery in (*first, *second)}) == 4


def test_a_global_prefix_is_before_every_key_and_in_no_tag(redis_url: str) -> None:
    """Apps behind two prefixes do not meet, with kombu's own client too."""
    pool = redis.ConnectionPool.from_url(redis_url)
    with PrefixedStrictRedis(global_keyprefix="shop:", connection_pool=pool) as client:
        broker = Broker(client, prefix="shop:")
        put(broker, "one", queue="a")
        delivery = broker.fetch_one(queues=("a",))
        assert delivery.tag == "w1:1:1:a"
        assert broker.messages.renew(client, [delivery.tag], 30) == []
        broker.messages.hold(client, delivery, 30)
        broker.requeue(delivery)
        with redis.Redis.from_url(redis_url) as plain:
            names = {key.decode() for key in plain.scan_iter()}
        assert {name for name in names if not name.startswith("shop:")} == set()
        assert {"shop:a", "shop:reliable:bell:a", "shop:reliable:run:{one}"} <= names
        assert broker.settle(broker.fetch_one(queues=("a",)))
    pool.disconnect()


@pytest.mark.parametrize("raw", ["no JSON", '"a text"', "[]", '{"headers": []}', '{"headers": {}}'])
def test_a_message_that_is_no_task_is_handed_out(broker: Broker, raw: str) -> None:
    """Who can make nothing of it decides in Python; it has no run to guard."""
    broker.publish(raw=raw)
    plan = broker.plan()
    ((tag, _, _, found, copy),) = plan.read(plan.run(broker.server))
    assert (found, copy.guard, copy.crashes) == (raw.encode(), Guard.MAY_RUN, 0)
    assert [*broker.leases] == [tag]
    assert broker.server.keys(broker.keys.runs + "*") == []


def test_a_queue_without_acknowledgements_records_nothing(broker: Broker) -> None:
    """What a consumer takes with no_ack is gone from the broker."""
    put(broker, "one", queue="a")
    put(broker, "two", queue="b")
    deliveries = broker.fetch(queues=("a", "b"), unleased=("a",))
    assert task_ids(deliveries) == ["one", "two"]
    assert [*broker.unacked] == [*broker.leases] == [*broker.index] == [deliveries[1].tag]
    assert broker.run_of("one") == {}


# -- fetch: a lost reply ---------------------------------------------------------------------


def test_a_repeated_fetch_returns_what_the_first_took(broker: Broker) -> None:
    """The same messages under the same tags, and none that came since."""
    put(broker, "one", "two", queue="a")
    put(broker, "three", queue="b", priority=3)
    plan = broker.plan(queues=("a", "b"))
    first = broker.run(plan)
    put(broker, "four", queue="a")
    before = broker.leases
    assert broker.run(plan.repeated()) == first
    assert broker.run(plan.repeated().repeated()) == first
    assert broker.waiting_ids("a") == ["four"]
    assert broker.leases == before


def test_a_fetch_that_never_arrived_is_repeated_in_vain(broker: Broker) -> None:
    """A repetition takes nothing: who repeats does not know which of its questions arrived."""
    plan = broker.plan()
    put(broker, "one")
    assert broker.run(plan.repeated()) == []
    assert broker.waiting_ids() == ["one"]


def test_a_repeated_fetch_does_not_return_what_is_over(broker: Broker) -> None:
    """A message that was settled or put back meanwhile is not handed out again."""
    put(broker, "one", "two", "three")
    plan = broker.plan()
    one, two, three = broker.run(plan)
    assert broker.settle(one)
    assert broker.requeue(two)
    assert broker.run(plan.repeated()) == [three]


def test_a_repeated_fetch_passes_over_what_a_stock_worker_put_back(broker: Broker) -> None:
    """A stock worker ends a delivery without its lease; the answer is still one."""
    put(broker, "one", "two")
    plan = broker.plan()
    one, two = broker.run(plan)
    broker.server.hdel("unacked", one.tag)
    broker.server.zrem("unacked_index", one.tag)
    assert broker.run(plan.repeated()) == [two]


def test_a_server_without_memory_hands_out_what_it_has(full_broker: FullBroker) -> None:
    """What is taken is moved, and what is worked off frees its memory: nothing else would."""
    broker, fill = full_broker
    put(broker, "one", "two", "three")
    fill()
    assert task_ids(broker.fetch(count=2)) == ["one", "two"]
    assert len(broker.unacked) == len(broker.leases) == len(broker.index) == 2
    assert broker.run_of("one")["tag"] in broker.unacked
    assert broker.waiting_ids() == ["three"]


def test_all_that_keeps_a_message_alive_works_without_memory(full_broker: FullBroker) -> None:
    """A worker that lives says so, renews, and may start what it has."""
    broker, fill = full_broker
    delivery = taken(broker)
    broker.end_lease(delivery)
    fill()
    assert broker.messages.renew(broker.server, [delivery.tag], 30) == []
    assert broker.leases[delivery.tag] > broker.now()
    assert broker.hold(delivery).may_run
    beat(broker, "w1")
    assert broker.server.zscore(broker.keys.beats, "w1")


def test_what_was_taken_can_be_ended_without_memory(full_broker: FullBroker) -> None:
    """Acknowledging and putting back free more than they take, and are not refused."""
    broker, fill = full_broker
    put(broker, "one", "two", "three")
    one, two, three = broker.fetch()
    broker.start(two)
    fill()
    assert broker.settle(one)
    assert broker.requeue(two)
    broker.messages.set_apart(broker.server, three.tag, three.raw)
    assert broker.waiting_ids() == ["two"]
    assert broker.unacked == broker.leases == {}
    assert [broker.dead_message(letter) for letter in broker.dead] == [three.raw]


def test_a_publish_without_memory_is_refused_whole(full_broker: FullBroker) -> None:
    """No claim without its message, and none of the token that would refuse the next try."""
    broker, fill = full_broker
    fill()
    with OOM:
        broker.publish(token="t1", publication=claiming())
    assert broker.server.keys() == []
    broker.server.config_set("maxmemory", 0)
    assert broker.publish(token="t1", publication=claiming()).code is Queued.QUEUED


# -- settle ----------------------------------------------------------------------------------


def test_a_settled_delivery_leaves_nothing(broker: Broker) -> None:
    """And can be settled again, which says that it was over."""
    delivery = taken(broker)
    assert broker.settle(delivery) is True
    assert broker.unacked == broker.index == broker.leases == broker.run_of() == {}
    assert broker.settle(delivery) is False


def test_a_late_settle_changes_nothing_of_the_successors(broker: Broker) -> None:
    """A worker that comes back after its lease cannot acknowledge what another one runs."""
    zombie, successor = taken_over(broker)
    broker.start(successor)
    before = everything(broker)
    assert broker.settle(zombie) is False
    assert everything(broker) == before
    assert broker.settle(successor) is True


def test_a_late_settle_changes_nothing_of_what_waits(broker: Broker) -> None:
    """Nor can it take back a message that waits for its next worker."""
    zombie = taken(broker)
    broker.end_lease(zombie)
    broker.sweep()
    before = everything(broker)
    assert broker.settle(zombie) is False
    assert everything(broker) == before
    assert broker.waiting_ids() == ["one"]


def test_a_task_that_had_other_copies_is_remembered_as_over(broker: Broker) -> None:
    """For an hour a copy that was stopped and forgotten cannot continue the task."""
    zombie, successor = taken_over(broker)
    broker.start(successor)
    assert successor.is_redelivered
    assert broker.settle(successor)
    assert broker.run_of() == {"tag": "over"}
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(3600, abs=5)
    assert broker.publish(publication=continuing(zombie)).code is Queued.SUPERSEDED
    assert broker.waiting_ids() == []


def test_a_task_that_is_over_may_be_called_again(broker: Broker) -> None:
    """A caller may use its id a second time."""
    _, successor = taken_over(broker)
    broker.settle(successor)
    assert taken(broker).copy.may_run


def test_a_copy_that_does_not_hold_the_run_leaves_it(broker: Broker) -> None:
    """Two messages with one id: the end of the one that waited is no end of the other."""
    put(broker, "one", "one")
    first, second = broker.fetch()
    broker.start(first)
    assert broker.settle(second)
    run = broker.run_of()
    assert (run["tag"], run["crashes"]) == (first.tag, "1")


# -- requeue ---------------------------------------------------------------------------------


def test_a_message_goes_back_in_front(broker: Broker) -> None:
    """It waited already, so it is the next one."""
    put(broker, "one", "two")
    (one,) = broker.fetch(count=1)
    assert broker.requeue(one) is True
    assert broker.waiting_ids() == ["one", "two"]
    assert broker.unacked == broker.index == broker.leases == {}


def test_a_message_can_go_behind_all_others(broker: Broker) -> None:
    """One that was rejected does not come back before those that wait."""
    put(broker, "one", "two")
    (one,) = broker.fetch(count=1)
    assert broker.requeue(one, to_back=True) is True
    assert broker.waiting_ids() == ["two", "one"]


def test_a_message_goes_back_to_its_priority(broker: Broker) -> None:
    """It is as urgent as before."""
    put(broker, "one", priority=3)
    assert broker.requeue(broker.fetch_one())
    assert broker.waiting_ids(priority=3) == ["one"]
    assert broker.waiting_ids() == []


def test_a_message_goes_back_marked_and_counted(broker: Broker) -> None:
    """As kombu marks it, with a count of deliveries, and with a tag that nobody has."""
    put(broker, "one")
    (before,) = broker.waiting()
    tags = {before["properties"]["delivery_tag"]}
    for count in (1, 2, 3):
        broker.requeue(broker.fetch_one())
        (after,) = broker.waiting()
        assert after["headers"] == {
            **before["headers"],
            "redelivered": True,
            "x-delivery-count": count,
        }
        properties = after["properties"]
        assert properties["delivery_info"] == {
            **before["properties"]["delivery_info"],
            "redelivered": True,
        }
        tags.add(properties["delivery_tag"])
        assert after["body"] == before["body"]
    assert len(tags) == 4
    assert broker.fetch_one().is_redelivered


def test_odd_headers_do_not_keep_a_message_from_going_back(broker: Broker) -> None:
    """A message of another program is not lost for its form."""
    raw = '{"headers": [1], "properties": {"delivery_info": null}, "x": "\\u2713"}'
    count = '{"headers": {"x-delivery-count": "many"}, "properties": "none"}'
    for odd in (raw, count):
        broker.publish(raw=odd)
        delivery = broker.fetch_one()
        broker.end_lease(delivery)
        assert broker.sweep() == 1
        (found,) = broker.waiting()
        assert found["headers"] == {"redelivered": True, "x-delivery-count": 1}
        assert broker.settle(broker.fetch_one())


def test_a_late_requeue_changes_nothing(broker: Broker) -> None:
    """A zombie cannot queue its successor's message a second time."""
    zombie, _ = taken_over(broker)
    before = everything(broker)
    for to_back in (False, True):
        assert broker.requeue(zombie, to_back=to_back) is False
    assert everything(broker) == before


def test_a_repeated_requeue_queues_once(broker: Broker) -> None:
    """Whichever reply is lost."""
    delivery = taken(broker)
    assert broker.requeue(delivery) is True
    assert broker.requeue(delivery) is False
    assert broker.waiting_ids() == ["one"]


def test_a_sweep_leaves_a_lease_that_lasts(broker: Broker) -> None:
    """Renewed between look and grip: the message stays with its worker."""
    delivery = taken(broker)
    before = everything(broker)
    assert broker.requeue(delivery, if_lapsed=True) is False
    assert everything(broker) == before


def test_a_sweep_puts_back_what_has_lapsed(broker: Broker) -> None:
    """By the server's clock alone."""
    delivery = taken(broker, lease=0.1)
    broker.let_pass(0.15)
    assert broker.requeue(delivery, if_lapsed=True) is True
    assert broker.waiting_ids() == ["one"]


def test_a_message_whose_lease_is_gone_counts_as_lapsed(broker: Broker) -> None:
    """A message without a lease would stay with nobody for ever."""
    delivery = taken(broker)
    broker.server.zrem(broker.keys.leases, delivery.tag)
    assert broker.requeue(delivery, if_lapsed=True) is True


def test_a_message_that_goes_back_wakes_a_worker(broker: Broker) -> None:
    """It need not wait until somebody looks."""
    delivery = taken(broker)
    assert broker.tokens() == 0
    broker.requeue(delivery)
    assert broker.tokens() == 1


# -- renew -----------------------------------------------------------------------------------


def test_a_lease_is_renewed(broker: Broker) -> None:
    """For both kinds of sweepers."""
    delivery = taken(broker, lease=5)
    assert broker.messages.renew(broker.server, [delivery.tag], 60) == []
    assert broker.leases == {delivery.tag: pytest.approx(broker.now() + 60, abs=2)}
    assert broker.index == {delivery.tag: pytest.approx(broker.now() + 60, abs=2)}


def test_a_late_renewal_brings_nothing_back(broker: Broker) -> None:
    """A zombie learns that its delivery is over, and its successor's lease stays as it is."""
    zombie, successor = taken_over(broker)
    before = broker.leases
    tags = [zombie.tag, successor.tag, "w9:1:1:celery"]
    over = broker.messages.renew(broker.server, [zombie.tag, "w9:1:1:celery"], 900)
    assert over == [zombie.tag, "w9:1:1:celery"]
    assert broker.leases == before
    assert [*broker.index] == [successor.tag]
    assert broker.messages.renew(broker.server, tags, 900) == over


def test_many_leases_are_renewed_in_bounded_steps(broker: Broker) -> None:
    """A worker may hold thousands."""
    put(broker, *(f"t{n}" for n in range(1203)))
    deliveries = broker.fetch(count=1203, lease=5)
    tags = [delivery.tag for delivery in deliveries]
    broker.settle(deliveries[700])
    assert broker.messages.renew(broker.server, tags, 600) == [tags[700]]
    assert min(broker.leases.values()) > broker.now() + 500
    assert len(broker.leases) == 1202


def test_stock_sweepers_times_are_renewed_in_turns(broker: Broker) -> None:
    """Those of one half, and the next time those of the other one; of the leases, all."""
    put(broker, *(f"t{n}" for n in range(40)))
    tags = [delivery.tag for delivery in broker.fetch(count=40, lease=5)]
    broker.messages.renew(broker.server, tags, 60, turn=7)
    first = {tag for tag, score in broker.index.items() if score > broker.now() + 50}
    assert 0 < len(first) < 40
    assert min(broker.leases.values()) > broker.now() + 50
    broker.messages.renew(broker.server, tags, 900, turn=8)
    second = {tag for tag, score in broker.index.items() if score > broker.now() + 800}
    assert first ^ second == set(tags)
    assert not first & second


def test_nothing_to_renew_asks_nothing(broker: Broker) -> None:
    """An idle worker renews nothing."""
    assert broker.messages.renew(broker.server, [], 30) == []


# -- the guard -------------------------------------------------------------------------------


def test_two_messages_with_one_id_do_not_run_at_once(broker: Broker) -> None:
    """The second waits while a worker holds the first, and is told for how long."""
    put(broker, "one", "one")
    (first,) = broker.fetch(count=1, lease=30)
    second = broker.fetch_one("w2", lease=30)
    assert first.copy.may_run
    assert second.copy.guard is Guard.HELD_ELSEWHERE
    assert second.copy.seconds == pytest.approx(30, abs=2)
    before = everything(broker)
    assert broker.hold(second).guard is Guard.HELD_ELSEWHERE
    assert everything(broker) == before, "what waits does not touch what runs"
    broker.settle(first)
    assert broker.hold(second).may_run
    assert broker.run_of()["tag"] == second.tag


def test_two_messages_with_one_id_in_one_fetch(broker: Broker) -> None:
    """The guard knows those that come together too."""
    put(broker, "one", "one")
    assert [delivery.copy.may_run for delivery in broker.fetch()] == [True, False]


def test_a_copy_may_ask_as_often_as_it_likes(broker: Broker) -> None:
    """Who holds the run holds it still."""
    delivery = taken(broker)
    assert broker.hold(delivery).may_run
    assert broker.hold(delivery).may_run


def test_a_run_whose_holder_has_lapsed_is_free(broker: Broker) -> None:
    """Before any sweep has put the other copy back."""
    put(broker, "one", "one")
    first, second = broker.fetch()
    broker.end_lease(first)
    assert broker.hold(second).may_run
    assert broker.requeue(first, if_lapsed=True)
    third = broker.fetch_one("w3")
    assert third.copy.guard is Guard.HELD_ELSEWHERE
    assert broker.run_of()["tag"] == second.tag


def test_a_copy_that_went_back_lets_the_other_run(broker: Broker) -> None:
    """An orderly return frees the run at once."""
    put(broker, "one", "one")
    first, second = broker.fetch()
    broker.requeue(first)
    assert broker.hold(second).may_run


def test_a_copy_whose_message_was_put_back_is_over(broker: Broker) -> None:
    """A worker that was stopped for long does not start what others have by now."""
    put(broker, "one")
    (delivery,) = broker.fetch("w1")
    broker.requeue(delivery)
    assert broker.hold(delivery).is_over


def test_two_tasks_do_not_wait_for_each_other(broker: Broker) -> None:
    """The guard is about one id."""
    put(broker, "one", "two")
    assert all(delivery.copy.may_run for delivery in broker.fetch())


# -- crashes ---------------------------------------------------------------------------------


def test_a_start_that_nothing_takes_back_is_a_crash(broker: Broker) -> None:
    """Each delivery is told how often the task was started and did not end."""
    put(broker, "one")
    for crashes in range(3):
        delivery = broker.fetch_one(f"w{crashes}")
        assert delivery.copy.crashes == crashes
        broker.start(delivery)
        broker.end_lease(delivery)
        assert broker.sweep() == 1
    assert broker.fetch_one().copy.crashes == 3


def test_a_message_that_was_only_prefetched_is_no_crash(broker: Broker) -> None:
    """It was never started, whatever became of its worker."""
    zombie, successor = taken_over(broker)
    assert zombie.tag != successor.tag
    assert successor.copy.crashes == 0


def test_an_orderly_return_takes_the_crash_back(broker: Broker) -> None:
    """A warm shutdown hands back and counts nothing."""
    delivery = taken(broker)
    broker.start(delivery)
    assert broker.run_of()["crashes"] == "1"
    broker.requeue(delivery)
    assert broker.fetch_one().copy.crashes == 0


def test_the_death_of_a_child_stands(broker: Broker) -> None:
    """The worker lives and puts the message back, but the run has crashed."""
    delivery = taken(broker)
    broker.start(delivery)
    delivery.has_crashed = True
    broker.requeue(delivery)
    assert broker.fetch_one().copy.crashes == 1


def test_a_copy_that_was_started_and_waits_again_is_no_crash(broker: Broker) -> None:
    """What was counted ahead is taken back while it is still held."""
    delivery = taken(broker)
    broker.start(delivery)
    broker.server.execute_command(*broker.messages.runs.count_start(delivery, -1))
    assert broker.hold(delivery).crashes == 0


def test_a_zombies_start_is_not_counted(broker: Broker) -> None:
    """Only the copy that holds the run changes its count."""
    zombie, successor = taken_over(broker)
    broker.start(zombie)
    assert broker.hold(successor).crashes == 0


def test_the_end_of_a_task_ends_its_count(broker: Broker) -> None:
    """The next call under the same id begins at nothing."""
    delivery = taken(broker)
    broker.start(delivery)
    broker.settle(delivery)
    assert taken(broker).copy.crashes == 0


def test_a_retry_keeps_what_crashed_before_it(broker: Broker) -> None:
    """Its own start is taken back, the crashes of the task are not."""
    put(broker, "one")
    crashed = broker.fetch_one()
    broker.start(crashed)
    broker.end_lease(crashed)
    broker.sweep()
    retrying = broker.fetch_one("w2")
    broker.start(retrying)
    broker.publish(publication=continuing(retrying))
    broker.settle(retrying)
    assert broker.fetch_one("w3").copy.crashes == 1


# -- continuations ---------------------------------------------------------------------------


def continuing(delivery: Delivery) -> Publication:
    """The wish to publish the continuation of a task."""
    return Publication(continues=delivery.tag, task_id=delivery.task_id)


def test_a_copy_that_was_continued_does_not_run_again(broker: Broker) -> None:
    """Killed between its retry and its ack: only the retry is left."""
    killed = taken(broker)
    broker.start(killed)
    assert broker.publish(publication=continuing(killed)).code is Queued.QUEUED
    assert f"continued:{killed.tag}" in broker.run_of()
    broker.end_lease(killed)
    assert broker.sweep() == 0
    assert broker.unacked == broker.leases == {}
    retry = broker.fetch_one("w2")
    assert retry.copy.may_run
    assert not retry.is_redelivered
    assert broker.fetch("w3") == []


def test_a_continuation_waits_for_the_copy_that_published_it(broker: Broker) -> None:
    """No two attempts at once."""
    first = taken(broker)
    broker.publish(publication=continuing(first))
    retry = broker.fetch_one("w2")
    assert retry.copy.guard is Guard.HELD_ELSEWHERE
    assert broker.settle(first)
    assert broker.hold(retry).may_run


def test_a_copy_that_was_continued_is_dropped_whoever_runs_now(broker: Broker) -> None:
    """Also when the retry took the run over before anybody swept."""
    killed = taken(broker)
    broker.publish(publication=continuing(killed))
    broker.end_lease(killed)
    retry = broker.fetch_one("w2")
    assert retry.copy.may_run
    assert broker.requeue(killed, if_lapsed=True) is False
    assert broker.waiting_ids() == []
    assert broker.run_of()["tag"] == retry.tag


def test_every_copy_that_was_continued_is_dropped(broker: Broker) -> None:
    """However far the task has come before anybody swept: retried again, or ended."""
    copies = [taken(broker)]
    for number in range(3):
        broker.publish(publication=continuing(copies[-1]))
        broker.end_lease(copies[-1])
        copies.append(broker.fetch_one(f"w{number}"))
        assert copies[-1].copy.may_run
    assert broker.settle(copies[-1])
    assert broker.sweep() == 0
    assert broker.waiting_ids() == []
    assert broker.unacked == {}


def test_a_continuation_of_several_messages_is_noted_when_it_is_whole(broker: Broker) -> None:
    """Only the copy that holds the run can say so."""
    zombie, successor = taken_over(broker)
    messages = broker.messages
    assert messages.runs.is_held(broker.server, "one", zombie.tag) is False
    assert messages.runs.is_held(broker.server, "one", successor.tag) is True
    assert messages.runs.is_held(broker.server, "forgotten", successor.tag) is True
    assert messages.runs.note_continued(broker.server, "one", zombie.tag) is False
    assert messages.runs.note_continued(broker.server, "one", successor.tag) is True
    assert messages.runs.note_continued(broker.server, "one", successor.tag) is True
    assert broker.requeue(successor) is False
    assert broker.waiting_ids() == []


def test_a_zombie_cannot_continue_its_task(broker: Broker) -> None:
    """Its successor does, or has."""
    zombie, _ = taken_over(broker)
    before = everything(broker)
    published = broker.publish(token="t1", publication=continuing(zombie))
    assert published.code is Queued.SUPERSEDED
    assert everything(broker) == before
    with pytest.raises(Superseded):
        published.check()


def test_a_copy_that_went_back_cannot_continue_its_task(broker: Broker) -> None:
    """While the message waits, nobody holds the run."""
    delivery = taken(broker)
    broker.requeue(delivery)
    assert broker.publish(publication=continuing(delivery)).code is Queued.SUPERSEDED


def test_a_run_that_the_server_forgot_is_no_reason_to_refuse(broker: Broker) -> None:
    """After a failover that lost it, a retry is still better published than lost."""
    delivery = taken(broker)
    broker.server.delete(broker.keys.run("one"))
    assert broker.publish(publication=continuing(delivery)).code is Queued.QUEUED
    left = broker.server.pttl(broker.keys.run("one")) / 1000
    assert left == pytest.approx(7 * 86400, abs=5), "and what is noted of it does not stay"
    assert broker.requeue(delivery) is False


def test_a_task_that_continued_itself_and_ends_leaves_its_run_to_the_retry(
    broker: Broker,
) -> None:
    """The last copy takes it away."""
    first = taken(broker)
    broker.publish(publication=continuing(first))
    assert broker.settle(first)
    assert broker.run_of()["tag"] == "queued"
    assert broker.settle(broker.fetch_one())
    assert broker.run_of() == {}


# -- runs beside another broker --------------------------------------------------------------


class Beside:
    """Copies of a task whose messages lie in RabbitMQ, and whose runs are guarded here."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._made = 0
        self._copy = taken(broker, "x").copy

    def copy(self) -> Delivery:
        """A delivery of the task that was not let in yet."""
        self._made += 1
        return Delivery(f"w{self._made}:1:1:rabbit", "rabbit", "rabbit", b"", self._copy, "one")

    def enter(self, delivery: Delivery, order: int = 0, *, is_copy: bool = False) -> Any:
        """Ask to be let in for 30 s."""
        messages, server = self._broker.messages, self._broker.server
        return messages.runs.enter(server, delivery, order=order, is_copy=is_copy, lease=30.0)

    def leave(self, delivery: Delivery, order: int = 0, *, goes_back: bool = False) -> bool:
        """End a copy; what is over is known for 100 s."""
        return self._broker.messages.runs.leave(
            self._broker.server, delivery, order=order, goes_back=goes_back, remembers=100.0
        )


def test_a_copy_beside_another_broker_is_let_in_and_counted(broker: Broker) -> None:
    """With a lease here; asked again, it is told the same."""
    beside = Beside(broker)
    first = beside.copy()
    for _ in range(2):
        copy = beside.enter(first)
        assert (copy.guard, copy.crashes) == (Guard.MAY_RUN, 0)
        assert broker.run_of()["crashes"] == "1"
    assert broker.leases[first.tag] == pytest.approx(broker.now() + 30, abs=2)


def test_a_copy_beside_another_broker_waits_for_one_that_lives(broker: Broker) -> None:
    """And is told for how long; it gets no lease and counts no crash."""
    beside = Beside(broker)
    first, second = beside.copy(), beside.copy()
    beside.enter(first)
    held = beside.enter(second, is_copy=True)
    assert (held.guard, held.seconds) == (Guard.HELD_ELSEWHERE, pytest.approx(30, abs=2))
    assert second.tag not in broker.leases
    assert broker.run_of()["crashes"] == "1"


def test_a_copy_beside_another_broker_runs_after_a_death(broker: Broker) -> None:
    """Its predecessor's crash stands, and a late end of that changes nothing."""
    beside = Beside(broker)
    dead, successor = beside.copy(), beside.copy()
    beside.enter(dead)
    broker.end_lease(dead)
    copy = beside.enter(successor, is_copy=True)
    assert (copy.guard, copy.crashes) == (Guard.MAY_RUN, 1)
    assert beside.leave(dead, goes_back=True) is False
    assert broker.run_of()["tag"] == successor.tag
    assert broker.run_of()["crashes"] == "2"


def test_a_copy_beside_another_broker_is_not_run_when_one_has_ended(broker: Broker) -> None:
    """The broker made it when a connection was lost; a new call under the id is no copy."""
    beside = Beside(broker)
    first, copy, new = beside.copy(), beside.copy(), beside.copy()
    beside.enter(first)
    assert beside.leave(first) is True
    assert beside.leave(first) is False
    assert beside.enter(copy, is_copy=True).is_over
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(100, abs=2)
    again = beside.enter(new)
    assert (again.guard, again.crashes) == (Guard.MAY_RUN, 0)


def test_a_copy_beside_another_broker_is_not_run_when_one_was_continued(broker: Broker) -> None:
    """Also where only the continuation was heard of; that one runs."""
    beside = Beside(broker)
    first, copy, retry = beside.copy(), beside.copy(), beside.copy()
    beside.enter(first)
    for _ in range(2):
        broker.messages.runs.note_done(broker.server, "one", 0)
    broker.end_lease(first)
    assert beside.enter(copy, is_copy=True).is_over
    assert beside.enter(retry, order=1).may_run
    assert beside.leave(retry, order=1) is True
    assert beside.enter(copy, is_copy=True).is_over


def test_a_continuation_is_noted_of_a_run_that_is_not_known(broker: Broker) -> None:
    """For a while, not for ever."""
    broker.messages.runs.note_done(broker.server, "one", 3)
    assert broker.run_of() == {"done": "3"}
    assert broker.server.pttl(broker.keys.run("one")) / 1000 == pytest.approx(3600, abs=5)
    broker.messages.runs.note_done(broker.server, "one", 2)
    assert broker.run_of() == {"done": "3"}


def test_a_copy_beside_another_broker_that_goes_back_is_no_crash(broker: Broker) -> None:
    """A warm shutdown takes its start back; the death of a child stands."""
    beside = Beside(broker)
    handed_back, crashed, last = beside.copy(), beside.copy(), beside.copy()
    beside.enter(handed_back)
    assert beside.leave(handed_back, goes_back=True)
    assert beside.enter(crashed, is_copy=True).crashes == 0
    crashed.has_crashed = True
    assert beside.leave(crashed, goes_back=True)
    assert beside.enter(last, is_copy=True).crashes == 1


# -- publish ---------------------------------------------------------------------------------


def claiming(owner: str = "one", **changes: Any) -> Publication:
    """The wish to take a claim."""
    wish: dict[str, Any] = {
        "claim": "shop.send_invoice:7",
        "owner": owner,
        "ttl": 45.0,
        "task": "shop.send_invoice",
    }
    return Publication(**{**wish, **changes})


def claim(broker: Broker) -> dict[str, str]:
    """The claim as it stands."""
    found = broker.server.hgetall(broker.keys.claim("shop.send_invoice:7"))
    return {name.decode(): value.decode() for name, value in found.items()}


def test_a_message_is_queued_as_it_is(broker: Broker) -> None:
    """A stock worker finds what kombu would have written."""
    raw = message()
    published = broker.publish(raw=raw, token="t1")
    assert published == Published(Queued.QUEUED, "", 0.0, 0)
    published.check()
    assert broker.server.lrange("celery", 0, -1) == [raw.encode()]
    assert broker.server.ttl("celery") == -1


def test_a_repeated_publish_queues_nothing(broker: Broker) -> None:
    """Whatever level tried again, and also when the message was taken meanwhile."""
    for _ in range(3):
        broker.publish("one", token="t1").check()
    assert broker.waiting_ids() == ["one"]
    assert broker.publish("one", token="t1").code is Queued.REPEATED
    broker.settle(broker.fetch_one())
    assert broker.publish("one", token="t1").code is Queued.REPEATED
    assert broker.fetch() == []
    assert broker.publish("one", token="t2").code is Queued.QUEUED


def test_a_publish_is_recognised_for_minutes(broker: Broker) -> None:
    """Longer than any client goes on trying, and not for ever."""
    broker.publish(token="t1")
    left = broker.server.pttl(broker.keys.sent("t1:celery")) / 1000
    assert left == pytest.approx(300, abs=5)


def test_a_claim_is_taken_with_the_message(broker: Broker) -> None:
    """One step: there is no claim without its message, and none without its claim."""
    published = broker.publish(token="t1", publication=claiming(claim_attempt=2))
    assert published.code is Queued.QUEUED
    found = claim(broker)
    assert (found["owner"], found["attempt"], found["token"]) == ("one", "2", "t1")
    assert found["task"] == "shop.send_invoice"
    assert "next_attempt" not in found
    left = broker.server.pttl(broker.keys.claim("shop.send_invoice:7")) / 1000
    assert left == pytest.approx(45, abs=2)
    assert broker.waiting_ids() == ["one"]


def test_a_message_whose_claim_is_taken_is_not_queued(broker: Broker) -> None:
    """The caller learns who has it, and nothing has changed."""
    broker.publish(publication=claiming())
    before = everything(broker)
    published = broker.publish("two", token="t2", publication=claiming("two"))
    assert (published.code, published.owner) == (Queued.CLAIM_TAKEN, "one")
    assert published.seconds == pytest.approx(45, abs=2)
    assert published.fence == int(claim(broker)["fence"])
    assert everything(broker) == before
    with pytest.raises(ClaimTaken) as caught:
        published.check()
    assert caught.value.published is published


def test_a_repeated_publish_with_a_claim_is_no_duplicate_of_itself(broker: Broker) -> None:
    """The claim that it finds is its own."""
    broker.publish(token="t1", publication=claiming())
    again = broker.publish(token="t1", publication=claiming())
    assert again.code is Queued.REPEATED
    assert broker.waiting_ids() == ["one"]


def test_a_claim_is_kept_for_a_continuation(broker: Broker) -> None:
    """What is queued in the same step counts as published at once."""
    broker.publish(publication=claiming())
    first = broker.fetch_one()
    fence = claim(broker)["fence"]
    wish = claiming(
        how="continue", claim_attempt=1, ttl=90.0, continues=first.tag, task_id="one", holder="h1"
    )
    assert broker.publish(token="t2", publication=wish).code is Queued.QUEUED
    found = claim(broker)
    assert (found["owner"], found["attempt"], found["token"]) == ("one", "1", "t2")
    assert found["fence"] == fence
    assert "next_attempt" not in found
    left = broker.server.pttl(broker.keys.claim("shop.send_invoice:7")) / 1000
    assert left == pytest.approx(90, abs=2)
    assert f"continued:{first.tag}" in broker.run_of()
    assert broker.publish(token="t2", publication=wish).code is Queued.REPEATED


def test_a_continuation_takes_a_claim_that_has_lapsed(broker: Broker) -> None:
    """A retry does not end because its key was forgotten."""
    wish = claiming(how="continue", claim_attempt=1)
    assert broker.publish(publication=wish).code is Queued.QUEUED
    assert (claim(broker)["owner"], claim(broker)["attempt"]) == ("one", "1")


@pytest.mark.parametrize(
    "wish",
    [
        claiming("two", how="continue", claim_attempt=9),
        claiming("one", how="continue", claim_attempt=0),
    ],
    ids=["another task", "an attempt that is no later"],
)
def test_a_claim_is_not_kept_for_others(broker: Broker, wish: Publication) -> None:
    """Another task's retry and a zombie's are refused, and neither message is queued."""
    broker.publish(publication=claiming())
    before = everything(broker)
    published = broker.publish("two", publication=wish)
    assert (published.code, published.owner) == (Queued.CLAIM_TAKEN, "one")
    assert everything(broker) == before


def test_a_superseded_publish_takes_no_claim(broker: Broker) -> None:
    """The task is asked first, its key second."""
    zombie, _ = taken_over(broker)
    wish = claiming(continues=zombie.tag, task_id="one")
    assert broker.publish(publication=wish).code is Queued.SUPERSEDED
    assert claim(broker) == {}


def test_a_queues_own_expiry_begins_anew(broker: Broker) -> None:
    """For all of its priorities, as with kombu; a queue without one does not expire."""
    put(broker, "urgent", priority=3)
    broker.publish("one", expires=(60_000, ["celery", list_of("celery", 3)]))
    for key in ("celery", list_of("celery", 3)):
        assert broker.server.pttl(key) / 1000 == pytest.approx(60, abs=2)
    put(broker, "two", queue="other")
    assert broker.server.pttl("other") == -1


def test_a_wish_is_about_one_message() -> None:
    """What Celery publishes besides, an event or a callback's message, is not meant."""
    wish = Publication(claim="c")
    assert publication_of({"id": "one"}) is None
    with publishing(wish, "one"):
        assert publication_of({"id": "one"}) is wish
        assert publication_of({"id": "two"}) is None
        assert publication_of({}) is None
        assert publication_of(None) is None
        with publishing(Publication(), None):
            assert publication_of({"id": "two"}) == Publication()
        assert publication_of({"id": "one"}) is wish
        assert contextvars.Context().run(publication_of, {"id": "one"}) is None
    assert publication_of({"id": "one"}) is None


# -- bells -----------------------------------------------------------------------------------


def test_a_message_wakes_one_worker(broker: Broker) -> None:
    """However many messages come: one token, which does not stay for ever."""
    for number in range(5):
        broker.publish(f"t{number}", priority=3 if number % 2 else 0)
    assert broker.tokens() == 1
    assert 0 < broker.server.pttl(broker.keys.bell("celery")) <= 60_000
    assert broker.server.blpop([broker.keys.bell("celery")], 1) is not None
    assert broker.tokens() == 0


def test_who_leaves_messages_behind_wakes_the_next(broker: Broker) -> None:
    """So a burst wakes as many as it needs, one after the other."""
    put(broker, "a1", "a2", "a3", queue="a")
    put(broker, "b1", queue="b", priority=3)
    queues = ("a", "b", "c")
    broker.fetch(queues=queues, count=2)
    assert [broker.tokens(queue) for queue in queues] == [1, 1, 0]
    broker.silence("a")
    broker.silence("b")
    broker.fetch(queues=queues, count=1)
    assert [broker.tokens(queue) for queue in queues] == [0, 1, 0]
    broker.silence("b")
    broker.fetch(queues=queues, count=10)
    assert [broker.tokens(queue) for queue in queues] == [0, 0, 0]


def test_a_refused_publish_wakes_nobody(broker: Broker) -> None:
    """There is nothing to take."""
    broker.publish(token="t1", publication=claiming())
    broker.silence()
    broker.publish(token="t1")
    broker.publish("two", publication=claiming("two"))
    assert broker.tokens() == 0


def test_the_sweeper_rings_for_stock_producers(broker: Broker) -> None:
    """For each queue with messages that some worker waits for, whatever their priority."""
    lists = {queue: [queue, list_of(queue, 3)] for queue in ("a", "b", "c")}
    broker.fleet.name_queues(broker.server, broker.now(), lists)
    broker.server.lpush("a", message("one"))
    broker.server.lpush(list_of("b", 3), message("two"))
    broker.server.lpush("unknown", message("three"))
    assert broker.fleet.ring(broker.server) == 2
    assert [broker.tokens(queue) for queue in ("a", "b", "c", "unknown")] == [1, 1, 0, 0]
    assert broker.fleet.ring(broker.server) == 2
    assert broker.tokens("a") == 1


def test_a_run_that_was_forgotten_publishes_more_than_once(broker: Broker) -> None:
    """What it publishes first makes it known again, as the one that may go on."""
    put(broker, "one")
    (running,) = broker.fetch()
    broker.server.delete(broker.keys.run("one"))
    for token in ("t1", "t2"):
        answer = broker.publish("other", token=token, publication=continuing(running))
        assert answer.code is Queued.QUEUED
    assert broker.messages.runs.is_held(broker.server, "one", running.tag)


def test_a_queue_that_nobody_names_is_forgotten(broker: Broker) -> None:
    """A worker that is gone leaves no work behind for the sweeper."""
    broker.server.lpush("a", message("one"))
    broker.server.lpush("b", message("two"))
    broker.fleet.name_queues(broker.server, broker.now() - 61, {"a": ["a"]})
    broker.fleet.name_queues(broker.server, broker.now() - 50, {"b": ["b"]})
    assert broker.fleet.ring(broker.server) == 1
    assert (broker.tokens("a"), broker.tokens("b")) == (0, 1)
    assert broker.server.zcard(broker.keys.queues) == 1
    broker.fleet.name_queues(broker.server, broker.now(), {"b": ["b"]})
    assert broker.server.zcard(broker.keys.queues) == 1


# -- workers and the one that sweeps ---------------------------------------------------------


def beat(
    broker: Broker, worker: str = "w1", *, server_id: str = "s1", elapsed: float = 0.0
) -> tuple[float, bool, float]:
    """Beat with a lease of 15 s, a term of 2.5 s and a gap of 5 s."""
    return broker.fleet.beat(
        broker.server,
        worker=worker,
        connection=f"{server_id} 7",
        server_id=server_id,
        lease=15.0,
        elapsed=elapsed,
        term=2.5,
        jump=5.0,
        gap=5.0,
    )


def change_sweeper(broker: Broker, **fields: float) -> None:
    """Move times that the sweeper noted, relative to the server's clock (s)."""
    for name, seconds in fields.items():
        at = f"{(broker.now() + seconds) * 1000:.0f}"
        broker.server.hset(broker.keys.sweeper, name, at)


def in_office(broker: Broker, worker: str = "w1") -> None:
    """Have a worker sweep, with nothing on hold."""
    beat(broker, worker)
    change_sweeper(broker, held_until=-1)
    assert beat(broker, worker)[1:] == (True, 0.0)


def test_a_beat_is_heard(broker: Broker) -> None:
    """By the server's clock; it says how to tell the keeper's connection."""
    now, _, _ = beat(broker)
    assert now == pytest.approx(broker.now(), abs=2)
    assert broker.fleet.silent(broker.server, now + 1) == {"w1": pytest.approx(now)}
    assert broker.fleet.keepers(broker.server, ["w1", "w2"]) == {"w1": "s1 7"}
    assert broker.fleet.keepers(broker.server, []) == {}


def test_a_worker_that_is_heard_is_not_silent(broker: Broker) -> None:
    """Silent is who was last heard of before a time, not at it."""
    now, _, _ = beat(broker)
    assert broker.fleet.silent(broker.server, now) == {}
    beat(broker, "w2")
    broker.server.zadd(broker.keys.beats, {"w1": (now - 3) * 1000})
    assert [*broker.fleet.silent(broker.server, now - 2)] == ["w1"]


def test_one_worker_sweeps(broker: Broker) -> None:
    """The first to beat, as long as it goes on."""
    in_office(broker, "w1")
    for _ in range(3):
        assert beat(broker, "w2")[1:] == (False, 0.0)
        assert beat(broker, "w1", elapsed=0.01)[1:] == (True, 0.0)


def test_another_takes_over_from_one_that_is_silent(broker: Broker) -> None:
    """When the term has ended; nothing need be held for that."""
    in_office(broker, "w1")
    change_sweeper(broker, until=-0.1, beat=-2.6)
    assert beat(broker, "w2")[1:] == (True, 0.0)
    assert beat(broker, "w1")[1:] == (False, 0.0)


def test_who_leaves_hands_over_at_once(broker: Broker) -> None:
    """And is forgotten; others who leave change nothing of the office."""
    in_office(broker, "w1")
    beat(broker, "w2")
    broker.fleet.leave(broker.server, "w2")
    assert beat(broker, "w2")[1] is False
    broker.fleet.leave(broker.server, "w1")
    assert [*broker.fleet.silent(broker.server, broker.now() + 9)] == ["w2"]
    assert broker.fleet.keepers(broker.server, ["w1"]) == {}
    assert beat(broker, "w2")[1] is True


def test_the_first_worker_of_all_waits_for_nothing(broker: Broker) -> None:
    """Where nobody ever swept, no keeper was kept from renewing."""
    assert beat(broker)[1:] == (True, 0.0)


def test_nobody_sweeps_for_a_lease_on_another_server(broker: Broker) -> None:
    """A restart or a failover: each keeper first has the time to renew its own."""
    in_office(broker)
    assert beat(broker, server_id="s2")[1:] == (True, pytest.approx(15, abs=1))
    change_sweeper(broker, held_until=-1)
    assert beat(broker, server_id="s2")[1:] == (True, 0.0)


@pytest.mark.parametrize(
    ("since", "elapsed"),
    [(-7.0, 1.0), (1e6, 1.0), (-1.0, 7.0)],
    ids=["the server's clock jumped, or nobody swept", "it went back", "it stood still"],
)
def test_nobody_sweeps_for_a_lease_when_the_clock_jumped(
    broker: Broker, since: float, elapsed: float
) -> None:
    """Leases that look lapsed may be those of workers that live."""
    in_office(broker)
    change_sweeper(broker, beat=since)
    assert beat(broker, elapsed=elapsed)[1:] == (True, pytest.approx(15, abs=1))


def test_a_beat_that_is_a_little_late_holds_nothing(broker: Broker) -> None:
    """A busy machine is no jump of the clock."""
    in_office(broker)
    change_sweeper(broker, beat=-4)
    assert beat(broker, elapsed=1)[1:] == (True, 0.0)
    change_sweeper(broker, beat=-9)
    assert beat(broker, elapsed=9)[1:] == (True, 0.0)


def test_a_fleet_that_was_down_sweeps_when_its_keepers_could_have_renewed(broker: Broker) -> None:
    """A gap without a sweeper is no proof of a jump: what lives renews in a third of a lease."""
    in_office(broker, "w1")
    change_sweeper(broker, beat=-60, until=-50)
    assert beat(broker, "w2")[1:] == (True, pytest.approx(8, abs=1))


def test_a_hold_does_not_outlast_a_lease(broker: Broker) -> None:
    """Also when the clock went back meanwhile."""
    in_office(broker)
    change_sweeper(broker, held_until=9999)
    assert beat(broker)[1:] == (True, pytest.approx(15, abs=1))


def test_a_clock_that_went_back_leaves_the_office_to_nobody_for_long(broker: Broker) -> None:
    """A term that seems to end far ahead was given before."""
    in_office(broker, "w1")
    change_sweeper(broker, until=3600)
    assert beat(broker, "w2")[1] is True


# -- the sweep -------------------------------------------------------------------------------


def test_the_leases_of_a_dead_worker_end_at_once(broker: Broker) -> None:
    """All of them, and nobody else's."""
    put(broker, *(f"t{n}" for n in range(1100)))
    dead = broker.fetch("w1", count=1050)
    alive = broker.fetch("w10", count=1000)
    assert broker.bury("w1") == 1050
    leases = broker.leases
    assert {leases[delivery.tag] for delivery in dead} == {0.0}
    assert all(leases[delivery.tag] > 0 for delivery in alive)
    assert broker.bury("w2") == 0
    assert len(broker.leases) == 1100


def test_a_worker_that_was_heard_of_meanwhile_keeps_its_leases(broker: Broker) -> None:
    """Whoever finds it silent is a moment late."""
    delivery = taken(broker)
    beat(broker, "w1")
    before = broker.leases
    assert broker.fleet.end_leases_of(broker.server, "w1", silent=2.0) is None
    assert broker.leases == before
    broker.fleet.leave(broker.server, "w1")
    assert broker.fleet.end_leases_of(broker.server, "w1", silent=2.0) is None
    assert broker.settle(delivery)


def test_asking_the_guard_renews_the_lease(broker: Broker) -> None:
    """What may start must not be put back in that moment."""
    delivery = taken(broker, lease=1.0)
    broker.end_lease(delivery)
    assert broker.hold(delivery).may_run
    assert broker.leases[delivery.tag] == pytest.approx(broker.now() + 30, abs=5)
    assert broker.index[delivery.tag] == pytest.approx(broker.now() + 30, abs=5)
    assert broker.sweep() == 0


def test_what_has_no_lease_any_more_is_over(broker: Broker) -> None:
    """Somebody has dropped it, though its message is still there."""
    delivery = taken(broker)
    broker.server.zrem(broker.keys.leases, delivery.tag)
    assert broker.hold(delivery).is_over
    assert not broker.leases


def test_a_worker_that_was_taken_for_dead_may_still_renew(broker: Broker) -> None:
    """Until its message was put back it is its own."""
    delivery = taken(broker)
    broker.bury("w1")
    assert broker.messages.renew(broker.server, [delivery.tag], 30) == []
    assert broker.requeue(delivery, if_lapsed=True) is False


def test_leases_that_have_ended_are_found(broker: Broker) -> None:
    """The oldest first, no more than asked for, none that lasts."""
    put(broker, "one", "two", "three", "four")
    one, two, three, _ = broker.fetch()
    for delivery, ago in ((one, 1), (two, 3), (three, 2)):
        broker.server.zadd(broker.keys.leases, {delivery.tag: (broker.now() - ago) * 1000})
    now = broker.now()
    expected = [two.tag, three.tag, one.tag]
    for limit in (2, 3, 9):
        found = broker.fleet.lapsed(broker.server, now, limit=limit)
        assert found == expected[:limit]


def test_leases_that_no_worker_can_have_given_are_found(broker: Broker) -> None:
    """The server's clock went back since."""
    put(broker, "one", "two")
    one, two = broker.fetch()
    now = broker.now()
    broker.server.zadd(broker.keys.leases, {one.tag: (now + 3600) * 1000})
    assert two.tag not in broker.fleet.leased_beyond(broker.server, now + 600, limit=9)
    assert broker.fleet.leased_beyond(broker.server, now + 600, limit=9) == [one.tag]
    assert broker.requeue(one, if_lapsed=True) is True


def test_a_delivery_is_found_by_its_tag(broker: Broker) -> None:
    """All that is needed to put it back, also where a queue's name has colons."""
    put(broker, "one", queue="a:b", priority=3)
    delivery = broker.fetch_one(queues=("a:b",))
    (found,) = broker.messages.find(broker.server, [delivery.tag])
    assert isinstance(found, Delivery)
    assert (found.tag, found.list, found.queue) == (delivery.tag, list_of("a:b", 3), "a:b")
    assert (found.task_id, found.is_redelivered, found.is_started) == ("one", False, False)
    assert json.loads(found.raw) == json.loads(delivery.raw)
    assert broker.requeue(found)
    assert broker.waiting_ids("a:b", 3) == ["one"]


def test_a_lease_without_a_message_is_found_and_dropped(broker: Broker) -> None:
    """That of another broker's delivery, or one whose message the server lost."""
    delivery = taken(broker)
    broker.server.hdel("unacked", delivery.tag)
    assert broker.messages.find(broker.server, [delivery.tag]) == [delivery.tag]
    assert broker.messages.find(broker.server, []) == []
    broker.messages.drop(broker.server, delivery.tag)
    assert broker.leases == broker.index == {}


def test_a_message_that_nobody_can_read_is_set_apart(broker: Broker) -> None:
    """It is kept whole, and not handed out again."""
    broker.publish(raw="no JSON")
    delivery = broker.fetch_one()
    broker.messages.set_apart(broker.server, delivery.tag, delivery.raw)
    (letter,) = broker.dead
    assert (letter.cause, letter.queue, letter.task_id) == ("undecodable", "celery", "")
    assert broker.dead_message(letter) == b"no JSON"
    assert broker.server.hlen("unacked") == 0
    assert broker.index == broker.leases == {}


def test_who_listens_is_told_of_a_message_that_is_set_apart(broker: Broker) -> None:
    """Who tells logs, and sends a signal."""
    told: list[Any] = []
    messages = Messages(
        broker.messages.layout,
        "reliable:",
        bounds=BOUNDS,
        when_set_apart=lambda letter, buried: told.append(
            (letter.message, buried.id, buried.count)
        ),
    )
    broker.publish(raw="no JSON")
    delivery = broker.fetch_one()
    messages.set_apart(broker.server, delivery.tag, delivery.raw)
    (letter,) = broker.dead
    assert told == [(b"no JSON", letter.id, 1)]


@pytest.mark.parametrize("raw", ["no JSON", '"a text"', "[1]", "\\"])
def test_one_message_that_nobody_can_read_does_not_stop_the_sweep(broker: Broker, raw: str) -> None:
    """Its worker died before it could set it apart; the others still go back."""
    put(broker, "one", "two")
    broker.publish(raw=raw)
    put(broker, "three")
    for delivery in broker.fetch():
        broker.end_lease(delivery)
    assert broker.sweep() == 3
    assert sorted(broker.waiting_ids()) == ["one", "three", "two"]
    (letter,) = broker.dead
    assert raw.encode() in broker.dead_message(letter)
    assert broker.server.hlen("unacked") == 0
    assert broker.leases == {}


@pytest.mark.parametrize("how", ["no list", "no right"])
def test_what_cannot_be_put_back_is_not_lost(redis_client: redis.Redis, how: str) -> None:
    """A push that is refused half-way leaves the message where it was, on lease."""
    with redis.Redis(port=redis_client.connection_pool.connection_kwargs["port"]) as client:
        broker = Broker(client)
        delivery = taken(broker)
        if how == "no list":
            client.set("celery", "is no list any more")
        else:
            client.execute_command("ACL", "SETUSER", "default", "-rpush", "-lpush")
        try:
            with pytest.raises(redis.exceptions.ResponseError, match=r"WRONGTYPE|permission"):
                broker.requeue(delivery)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+rpush", "+lpush")
        assert list(broker.unacked) == list(broker.leases) == [delivery.tag]
        client.delete("celery") if how == "no list" else None
        broker.end_lease(delivery)
        assert broker.sweep() == 1
        assert broker.waiting_ids() == ["one"]


def test_a_large_message_is_taken_alone(broker: Broker) -> None:
    """The server reads each one, and does nothing else meanwhile."""
    large = json.loads(message("large"))
    large["body"] = "x" * 1_000_001
    broker.publish("small")
    broker.publish(raw=json.dumps(large))
    broker.publish(raw=json.dumps(large))
    assert task_ids(broker.fetch(count=10)) == ["small", "large"]
    assert broker.tokens() == 1, "another worker is woken for the rest"


def test_few_large_messages_are_put_back_at_once(broker: Broker) -> None:
    """The others come with the next beat."""
    large = json.loads(message("large"))
    large["body"] = "x" * 3_000_000
    for _ in range(4):
        broker.publish(raw=json.dumps(large))
    tags = [broker.fetch_one(count=1).tag for _ in range(4)]
    assert len(broker.messages.find(broker.server, tags)) == 3
    assert broker.messages.find(broker.server, []) == []


@pytest.mark.parametrize("header", ["id", "deep"])
def test_a_message_that_no_key_can_be_made_of_keeps_nobody_waiting(
    broker: Broker, header: str
) -> None:
    """An id that UTF-8 cannot say is guarded by nobody; what is nested without end is set apart."""
    raw = message("odd").replace('"odd"', r'"odd \udc80"')
    if header == "deep":
        raw = raw.replace('"headers": {', '"headers": {"deep": ' + "[" * 9000 + "]" * 9000 + ", ")
    broker.publish(raw=raw)
    put(broker, "one")
    for delivery in broker.fetch():
        broker.end_lease(delivery)
    assert broker.sweep() == (2 if header == "id" else 1)
    assert "one" in str(broker.server.lrange("celery", 0, -1))
    assert broker.unacked == broker.leases == {}


def test_a_run_that_goes_on_has_its_message_again(broker: Broker) -> None:
    """Its worker was taken for dead, and is handed the copy: the run's own tag counts again."""
    run, copy = taken_over(broker)
    assert broker.messages.resume(broker.server, copy, run, 30) is True
    assert broker.messages.resume(broker.server, copy, run, 30) is True
    assert list(broker.unacked) == list(broker.leases) == list(broker.index) == [run.tag]
    assert broker.run_of()["tag"] == run.tag
    assert broker.publish(publication=continuing(run)).code is Queued.QUEUED
    assert broker.settle(copy) is False
    assert broker.settle(run) is True
    assert broker.unacked == broker.leases == broker.index == {}


def test_a_run_whose_copy_is_elsewhere_has_nothing(broker: Broker) -> None:
    """Who does not hold the run cannot give it."""
    run, copy = taken_over(broker)
    broker.requeue(copy)
    assert broker.messages.resume(broker.server, copy, run, 30) is False
    third = broker.fetch_one("w3")
    assert broker.messages.resume(broker.server, copy, run, 30) is False
    assert list(broker.unacked) == [third.tag]


def test_a_run_that_begins_again_continues_its_task_once(broker: Broker) -> None:
    """Its first retry was queued, and nobody heard of it; the guard knows before it starts."""
    delivery = taken(broker)
    wish = Publication(continues=delivery.tag, task_id="one", is_only=True)
    assert broker.publish(token="t1", publication=wish).code is Queued.QUEUED
    assert broker.publish(token="t2", publication=wish).code is Queued.REPEATED
    assert broker.waiting_ids() == ["one"]
    copy = broker.hold(delivery)
    assert copy.has_continued
    assert not copy.may_run


def test_a_message_for_two_queues_makes_one_claim(broker: Broker) -> None:
    """The second does not meet the first as a duplicate; nor does a retry."""
    new = Publication(claim="key", owner="one", ttl=60, task="t")
    for queue in ("a", "b"):
        assert broker.publish(queue=queue, token="t1", publication=new).code is Queued.QUEUED
    retry = Publication(claim="key", how="continue", owner="one", claim_attempt=1, ttl=60, task="t")
    for queue in ("a", "b"):
        assert broker.publish(queue=queue, token="t2", publication=retry).code is Queued.QUEUED
    other = Publication(claim="key", owner="two", ttl=60, task="t")
    assert broker.publish("two", token="t4", publication=other).code is Queued.CLAIM_TAKEN


def test_what_has_lapsed_is_put_back_in_one_go(broker: Broker) -> None:
    """Those that were renewed meanwhile stay, and a flushed script is loaded again."""
    put(broker, *(f"t{n}" for n in range(30)))
    taken = broker.fetch(count=30)
    for delivery in taken[:20]:
        broker.end_lease(delivery)
    broker.server.script_flush()
    put_back = broker.messages.requeue_lapsed(broker.server, taken, 600.0, list)
    assert put_back == taken[:20]
    assert set(broker.waiting_ids()) == {f"t{n}" for n in range(20)}
    assert set(broker.unacked) == {delivery.tag for delivery in taken[20:]}
    assert broker.messages.requeue_lapsed(broker.server, [], 600.0, list) == []


def test_one_that_cannot_be_put_back_does_not_keep_the_others(broker: Broker) -> None:
    """Its error is raised when the rest has gone back."""
    put(broker, "one", "three")
    put(broker, "two", queue="odd")
    deliveries = [broker.fetch_one(count=1), broker.fetch_one(queues=["odd"]), broker.fetch_one()]
    for delivery in deliveries:
        broker.end_lease(delivery)
    broker.server.set("odd", "is no list any more")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        broker.messages.requeue_lapsed(broker.server, deliveries, 600.0, list)
    assert set(broker.waiting_ids()) == {"one", "three"}


def put_once(broker: Broker, owner: str, *, attempt: int = 0, **options: Any) -> None:
    """Queue the message of a once-task, with its claim."""
    carried = {"key": "key", "owner": owner, "attempt": attempt}
    broker.publish(
        owner,
        raw=message(owner, reliable_claim=carried),
        publication=Publication(claim="key", owner=owner, ttl=60, task="t", **options),
    )


def claim_of(broker: Broker) -> dict[bytes, bytes]:
    """Return the claim's record."""
    found: Any = broker.server.hgetall(broker.keys.claim("key"))
    return dict(found)


def purge(broker: Broker, told: list[Thrown] | None = None) -> int:
    """Throw away what waits; claims that are not here are told."""
    return broker.messages.purge(broker.server, "celery", ([] if told is None else told).extend)


def test_a_purge_frees_the_claims_of_what_it_throws_away(broker: Broker) -> None:
    """All messages are counted, also those that nobody can read."""
    put_once(broker, "one")
    put(broker, "two")
    broker.server.lpush("celery", "no message", '{"headers": {"reliable_claim": 7}}', "[]")
    assert purge(broker) == 5
    assert claim_of(broker) == {}
    assert broker.waiting_ids() == []
    assert purge(broker) == 0


def test_a_purge_tells_of_claims_that_are_kept_elsewhere(broker: Broker) -> None:
    """With all that is needed to free them there."""
    put_once(broker, "one")
    broker.server.delete(broker.keys.claim("key"))
    told: list[Thrown] = []
    assert purge(broker, told) == 1
    assert told == [Thrown("key", "one", 0, "shop.send_invoice")]


def test_a_purge_of_many(broker: Broker) -> None:
    """It takes more than one step."""
    put(broker, *(f"t{n}" for n in range(450)))
    assert purge(broker) == 450


def test_a_purge_of_a_list_that_has_a_neighbour(broker: Broker) -> None:
    """Another queue may have almost the same name."""
    put(broker, "one")
    for end in (":", "\0", ":0"):
        broker.server.rpush(f"celery{end}", "a message")
    assert purge(broker) == 1
    assert all(broker.server.llen(f"celery{end}") == 1 for end in (":", "\0", ":0"))


@pytest.mark.parametrize("is_retry", [True, False])
def test_a_purge_beside_a_run_that_has_published_its_retry(broker: Broker, is_retry: bool) -> None:
    """Who throws the retry away takes its claim, when the run has ended; a late copy takes none."""
    put_once(broker, "one")
    (delivery,) = broker.fetch()
    broker.server.hset(broker.keys.claim("key"), "next_attempt", 1)
    carried = {"key": "key", "owner": "one", "attempt": int(is_retry)}
    broker.server.lpush("celery", message("one", reliable_claim=carried))
    broker.end_lease(delivery)
    assert purge(broker) == 1
    assert bool(claim_of(broker)) is not is_retry


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_lapsed_and_was_continued_leaves_no_claim(broker: Broker, where: str) -> None:
    """Its task has been replaced, and nobody comes to free its key."""
    put_once(broker, "one")
    (delivery,) = broker.fetch()
    broker.messages.runs.note_continued(broker.server, "one", delivery.tag)
    broker.end_lease(delivery)
    if where == "elsewhere":
        broker.server.delete(broker.keys.claim("key"))
    told: list[Thrown] = []
    assert broker.messages.requeue_lapsed(broker.server, [delivery], 600.0, told.extend) == []
    assert broker.waiting_ids() == []
    assert claim_of(broker) == {}
    gone = Thrown("key", "one", 0, "shop.send_invoice", is_run_over=True)
    assert told == ([gone] if where == "elsewhere" else [])


def test_what_lapsed_and_was_retried_leaves_the_claim(broker: Broker) -> None:
    """It is that of the next attempt, which waits in the queue."""
    put_once(broker, "one")
    (delivery,) = broker.fetch()
    broker.messages.runs.note_continued(broker.server, "one", delivery.tag)
    broker.server.hset(broker.keys.claim("key"), "next_attempt", 1)
    broker.end_lease(delivery)
    assert broker.messages.requeue_lapsed(broker.server, [delivery], 600.0, list) == []
    assert claim_of(broker)[b"owner"] == b"one"


@pytest.mark.parametrize("differs", ["owner", "attempt", "window"])
def test_a_purge_leaves_the_claims_of_others(broker: Broker, differs: str) -> None:
    """Another task has the key by now, or a later attempt, or it is taken for a window."""
    put_once(broker, "one", how="window" if differs == "window" else "acquire")
    if differs != "window":
        broker.server.hset(broker.keys.claim("key"), differs, 1)
    before = claim_of(broker)
    assert purge(broker) == 1
    assert claim_of(broker) == before


@pytest.mark.parametrize("lives", [True, False])
def test_a_purge_and_a_run_that_handed_its_claim_on(broker: Broker, lives: bool) -> None:
    """The end of the run frees the key, and not the purge beside it; unless it is dead."""
    put_once(broker, "one")
    (delivery,) = broker.fetch()
    claims = Claims(ServerAddress("redis://unused/0", 5.0), "reliable:")
    enter = [claims.keys.claim("key"), claims.keys.ended("key"), claims.keys.leases]
    load("claim_enter").on(
        broker.server,
        [*enter, claims.keys.replaced("key")],
        ["one", 0, "h1", 30_000, 60_000, "t", delivery.tag, ""],
    )
    put_once(broker, "two", holder="h1")
    assert claim_of(broker)[b"owner"] == b"two"
    if not lives:
        broker.end_lease(delivery)
    assert purge(broker) == 1
    if not lives:
        assert claim_of(broker) == {}
        return
    record = claim_of(broker)
    assert (record[b"owner"], record[b"holder"]) == (b"one", b"h1")
    assert b"holder_owner" not in record


def test_a_message_that_is_laid_aside_comes_back_in_time(broker: Broker) -> None:
    """Nobody renews it, and nobody was at fault; its task was not started in vain."""
    put(broker, "one")
    delivery = broker.fetch_one()
    broker.start(delivery)
    assert broker.messages.lay_aside(broker.server, delivery, 0.3)
    assert broker.messages.lay_aside(broker.server, delivery, 0.3), "its reply was lost"
    assert not broker.requeue(delivery, if_lapsed=True)
    broker.let_pass(0.4)
    assert broker.messages.requeue_lapsed(broker.server, [delivery], 600.0, list) == [delivery]
    assert delivery.was_aside
    again = broker.fetch_one()
    assert (again.copy.may_run, again.copy.crashes) == (True, 0)


def test_a_copy_that_was_continued_is_not_laid_aside(broker: Broker) -> None:
    """Its retry runs in its place, and it would be a second one."""
    put(broker, "one")
    delivery = broker.fetch_one()
    broker.start(delivery)
    broker.publish("one", publication=continuing(delivery))
    broker.messages.runs.note_continued(broker.server, "one", delivery.tag)
    assert broker.messages.lay_aside(broker.server, delivery, 0.3)
    assert not broker.messages.lay_aside(broker.server, delivery, 0.3)
    assert (broker.leases, broker.unacked, broker.index) == ({}, {}, {})
    again = broker.fetch_one()
    assert (again.copy.may_run, again.copy.crashes) == (True, 0)


def test_another_copy_runs_while_one_is_laid_aside(broker: Broker) -> None:
    """It is not alive; and when it comes back its other copy is."""
    put(broker, "one", "one")
    first, second = broker.fetch(count=2)
    assert not broker.hold(second).may_run
    broker.messages.lay_aside(broker.server, first, 0.3)
    assert broker.hold(second).may_run
    broker.let_pass(0.4)
    (back,) = broker.messages.requeue_lapsed(broker.server, [first], 600.0, list)
    assert not back.was_aside, "it is not known any more, for the other one runs"
    assert not broker.fetch_one().copy.may_run


def test_a_delivery_that_is_over_is_not_laid_aside(broker: Broker) -> None:
    """Its message is somebody else's, or nobody's."""
    put(broker, "one")
    delivery = broker.fetch_one()
    broker.settle(delivery)
    assert not broker.messages.lay_aside(broker.server, delivery, 60)
    assert broker.leases == {}
