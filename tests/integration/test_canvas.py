"""A canvas completes, whoever has the keys of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, group

from reliable_tasks import DuplicateTaskError, FollowTimeout
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps import canvas
from tests.integration.conftest import StartScene, other_database
from tests.integration.scene import Scene
from tests.support import wait_until

POOLS = ["prefork", "threads", "gevent"]
SLOTS = 3
#: So long may a canvas take once the task has ended that it waits for (s).
SOON = 20


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    """Kinds of pool in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def shop(pool: str, module_redis: EmbeddedServer, module_scenes: StartScene) -> Scene:
    """One worker with a few slots, on databases of its own."""
    number = 2 * POOLS.index(pool)
    urls = (other_database(module_redis, n) for n in (number, number + 1))
    scene = module_scenes(
        *urls, limit=30, module=canvas, settings={"worker_prefetch_multiplier": 5}
    )
    scene.worker(pool=pool, concurrency=SLOTS)
    return scene


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for each name is one `@once` key."""
    return uuid4().hex[:8]


class Parts:
    """Signatures of the tests' tasks."""

    def __init__(self, scene: Scene, name: str) -> None:
        tasks = scene.app.tasks
        self.name = name
        self.same = tasks["act"].si(name)
        self.strict = tasks["strict"].si(name)
        self._tasks = tasks

    def plus(self, name: str, value: str | None = None) -> Any:
        """Something after a task, which takes its result; or before it."""
        task = self._tasks["plus"]
        return task.s(name) if value is None else task.si(value, name)

    def collect(self, name: str) -> Any:
        """The body of a chord."""
        return self._tasks["collect"].s(name)

    def note_failure(self) -> Any:
        """What runs if something has failed."""
        return self._tasks["note_failure"].s(self.name)


@pytest.fixture
def parts(shop: Scene, name: str) -> Parts:
    """Signatures with the test's own key."""
    return Parts(shop, name)


#: Shapes of a canvas with a task whose key is taken, and what each returns in the end.
SHAPES: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "head of a chain": (lambda p: chain(p.same, p.plus("b")), "{n} > b"),
    "middle of a chain": (
        lambda p: chain(p.plus("a", ""), p.same, p.plus("b")),
        "{n} > b",
    ),
    "end of a chain": (lambda p: chain(p.plus("a", ""), p.same), "{n}"),
    "in a group": (lambda p: group(p.same, p.plus("b", "a"), p.same), "['{n}', 'a > b', '{n}']"),
    "in the header of a chord": (
        lambda p: chord([p.same, p.plus("b", "a")], p.collect("c")),
        "{n} + a > b > c",
    ),
    "body of a chord": (lambda p: chord([p.plus("a", ""), p.plus("b", "")], p.same), "{n}"),
    "twice in a chain": (lambda p: chain(p.same, p.same, p.plus("b")), "{n} > b"),
    "nested": (
        lambda p: chain(
            group(p.same, chain(p.same, p.plus("a"))),
            p.collect("c"),
            chord([chain(p.same, p.plus("d")), p.same], p.collect("e")),
        ),
        "{n} > d + {n} > e",
    ),
}


def test_duplicates_end_as_the_task_that_has_their_key(shop: Scene, name: str) -> None:
    """Until it has ended nothing takes a slot for them; then all goes on, in each shape."""
    all_parts = {shape: Parts(shop, f"{name} {n}") for n, shape in enumerate(SHAPES)}
    owners = [shop.call("act", parts.name, queue=name) for parts in all_parts.values()]
    results = {shape: SHAPES[shape][0](parts).apply_async() for shape, parts in all_parts.items()}
    others = [shop.call("bare", f"{name}, other {n}") for n in range(SLOTS)]
    for other in others:
        other.get(timeout=SOON)
    assert not [shape for shape, result in results.items() if result.ready()]
    shop.release(name)
    for shape, parts in all_parts.items():
        expected = SHAPES[shape][1].format(n=parts.name)
        assert str(results[shape].get(timeout=2 * SOON)) == expected, f"{shape}\n{shop.logs}"
    for owner, parts in zip(owners, all_parts.values(), strict=True):
        assert owner.get(timeout=SOON) == parts.name
        shop.wait_free(parts.name)


@pytest.mark.parametrize("kind", ["link", "link_error"])
def test_a_callback_runs_whoever_has_its_key(
    shop: Scene, name: str, parts: Parts, kind: str
) -> None:
    """It is a duplicate, and what comes after it comes."""
    owner = shop.call("act", name, "wait")
    shop.wait_starts(name)
    callback = parts.same.clone()
    callback.link(parts.plus(f"{name}, after"))
    what = "succeed" if kind == "link" else "fail"
    shop.call("bare", f"{name}, caller", what, **{kind: callback})
    shop.wait_followed(owner.id)
    shop.journal.open(name)
    shop.wait_starts(f"{name}, after", timeout=SOON)
    assert shop.starts(name) == 1


def test_callbacks_of_a_duplicate_are_called(shop: Scene, name: str, parts: Parts) -> None:
    """A call with a link has a result of its own, and says whom it follows."""
    owner = shop.call("act", name, "wait")
    shop.wait_starts(name)
    result = shop.call("act", name, link=parts.plus(f"{name}, after"))
    assert (result.duplicate, result.followed_id) == (True, owner.id)
    assert result.id != owner.id
    shop.journal.open(name)
    assert result.get(timeout=SOON) == name
    shop.wait_starts(f"{name}, after")
    assert shop.starts(name) == 1


def test_the_failure_of_the_owner_is_that_of_its_duplicates(
    shop: Scene, name: str, parts: Parts
) -> None:
    """With its error, and the rest of the chain hears of it."""
    shop.call("act", name, "wait_and_fail")
    shop.wait_starts(name)
    rest = chain(parts.same, parts.plus("b")).on_error(parts.note_failure())
    result = rest.apply_async()
    shop.journal.open(name)
    with pytest.raises(ValueError, match=name):
        result.parent.get(timeout=SOON)
    wait_until(lambda: shop.journal.events("failure", name=name), SOON, lambda: shop.logs)
    assert shop.starts(name) == 1


def test_a_duplicate_that_is_refused_fails_in_its_place(
    shop: Scene, name: str, parts: Parts
) -> None:
    """With ``on_conflict="raise"``: the head to its caller, the others as a failed task."""
    shop.call("strict", name)
    shop.wait_starts(name)
    with pytest.raises(DuplicateTaskError):
        chain(parts.strict, parts.plus("b")).apply_async()
    in_group = group(parts.strict, parts.plus("b", "a")).apply_async()
    in_chain = chain(parts.plus("a", ""), parts.strict, parts.plus("b")).apply_async()
    in_chord = chord(
        [parts.strict, parts.plus("b", "a")], parts.collect("c").on_error(parts.note_failure())
    ).apply_async()
    as_body = chord([parts.plus("a", ""), parts.plus("b", "")], parts.strict)()
    for result in (in_group[0], in_chain.parent, as_body):
        with pytest.raises(DuplicateTaskError, match="owns"):
            result.get(timeout=SOON)
    assert in_group[1].get(timeout=SOON) == "a > b"
    wait_until(lambda: in_chord.ready(), SOON, lambda: shop.logs)
    assert in_chord.failed()
    wait_until(lambda: shop.journal.events("failure", name=name), SOON, lambda: shop.logs)
    shop.journal.open(name)
    assert shop.starts(name) == 1


def test_a_duplicate_runs_if_nobody_knows_how_its_owner_ended(
    shop: Scene, name: str, parts: Parts
) -> None:
    """The owner's result is gone: the key is free, and the duplicate takes it."""
    owner = shop.call("act", name, "wait")
    shop.wait_starts(name)
    result = chain(parts.same.set(queue=name), parts.plus("b")).apply_async()
    shop.journal.open(name)
    owner.get(timeout=SOON)
    shop.wait_free(name)
    owner.forget()
    shop.release(name)
    assert result.get(timeout=SOON) == f"{name} > b"
    assert shop.starts(name) == 2


@pytest.mark.parametrize("what", ["chain", "group", "chord"])
def test_an_owner_that_becomes_a_canvas_with_its_own_key(shop: Scene, name: str, what: str) -> None:
    """Its part with the key runs when it has ended, and nobody waits for himself."""
    result = shop.call("becomes", name, what)
    result.get(timeout=SOON)
    assert shop.starts(name) == 2
    shop.wait_free(name, task="becomes")


@pytest.mark.parametrize("task", ["caller", "strict caller"])
def test_what_the_owners_run_has_led_to_runs_after_it(shop: Scene, name: str, task: str) -> None:
    """By way of another task, too: it does not share the end of what has called it."""
    owner = shop.call(task, name, task)
    shop.wait_starts(name)
    (called,) = [
        shop.app.AsyncResult(result)
        for result in [wait_until(lambda: _result_of_calls(shop, name), SOON, lambda: shop.logs)]
    ]
    shop.wait_followed(owner.id)
    assert shop.starts(name) == 1
    shop.journal.open(name)
    assert called.get(timeout=SOON) == f"{name} > b"
    assert shop.starts(name) == 2
    shop.wait_free(name, task=task)


def _result_of_calls(shop: Scene, name: str) -> str | None:
    """Return the id of the canvas that was called, once it was."""
    ended = shop.journal.events("end", name=f"{name}, calls")
    if not ended:
        return None
    value = shop.app.AsyncResult(ended[0].data["id"]).result
    return value if isinstance(value, str) else None


@pytest.mark.parametrize("what", ["chain", "chord"])
def test_the_last_part_of_what_an_owner_has_become_meets_another_owner(
    shop: Scene, name: str, what: str
) -> None:
    """Which called while nobody had the key: it ends as that one, for the canvas to complete."""
    result = shop.call("becomes", name, f"later, {what}")
    shop.wait_starts(f"{name}, first")
    shop.wait_free(name, task="becomes")
    other = shop.call("becomes", name, "wait")
    shop.wait_starts(name, 2)
    shop.journal.open(f"{name}, first")
    shop.wait_followed(other.id)
    shop.journal.open(name)
    assert result.get(timeout=SOON) == other.get(timeout=SOON) == name
    assert shop.starts(name) == 2
    shop.wait_free(name, task="becomes")


@pytest.mark.parametrize("task", ["while_executing", "while_executing, drop", "act", "strict"])
def test_a_chain_of_the_same_task_takes_its_turns(shop: Scene, name: str, task: str) -> None:
    """Nobody drops what its own chain calls for the one before it is not quite over."""
    shop.journal.open(name)
    same = shop.app.tasks[task].si(name)
    assert chain(same, same, same).apply_async().get(timeout=SOON) == name
    assert shop.starts(name) == 3


def test_a_chain_of_the_same_task_has_one_window(shop: Scene, name: str) -> None:
    """Which nothing frees: the first runs, and the others end as it does."""
    same = shop.app.tasks["until_expired"].si(name)
    assert chain(same, same, same).apply_async().get(timeout=SOON) == name
    assert shop.starts(name) == 1


def test_two_canvases_that_need_each_others_keys(shop: Scene, name: str) -> None:
    """Neither waits for the other for ever."""
    act = shop.app.tasks["act"]
    one, two = (act.si(f"{name} {n}", "take_a_while") for n in (1, 2))
    results = [chain(*pair).apply_async() for pair in ((one, two), (two, one)) * 3]
    for result in results:
        result.get(timeout=SOON)
    for n in (1, 2):
        shop.wait_free(f"{name} {n}")


# -- with servers and workers of a test's own ----------------------------------------------------


@pytest.fixture
def own(redis_server: EmbeddedServer, scenes: StartScene) -> Scene:
    """The same app, without a worker yet."""
    return scenes(redis_server.url, other_database(redis_server), limit=60, module=canvas)


def test_an_owner_that_was_purged(own: Scene, name: str) -> None:
    """Its claim goes with its message, and its duplicate runs."""
    owner = own.call("act", name, queue="elsewhere")
    parts = Parts(own, name)
    result = chain(parts.same, parts.plus("b")).apply_async()
    own.worker()
    own.wait_followed(owner.id)
    with own.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge("elsewhere") == 1
    assert result.get(timeout=SOON) == f"{name} > b"
    assert own.starts(name) == 1


@pytest.mark.parametrize("task", ["act", "until_executing", "until_and_while_executing"])
def test_an_owner_whose_worker_was_killed(own: Scene, name: str, task: str) -> None:
    """It runs again, and its duplicate ends as it does."""
    parts = Parts(own, name)
    own.call(task, name, "wait")
    same = own.app.tasks[task].si(name)
    result = chain(same, parts.plus("b")).apply_async()
    own.crew(2, concurrency=1)
    own.wait_starts(name)
    (start,) = own.journal.events("start", name=name)
    next(w for w in own.workers if start.pid in w.child_pids()).kill_group()
    own.wait_starts(name, 2, timeout=SOON)
    own.journal.open(name)
    assert result.get(timeout=SOON) == f"{name} > b"
    assert own.starts(name) == 2


def test_one_that_cannot_wait_any_longer(
    redis_server: EmbeddedServer, scenes: StartScene, name: str
) -> None:
    """It fails, says of what, and frees nobody's key."""
    settings = {"reliable_once_ttl": 2}
    scene = scenes(
        redis_server.url, other_database(redis_server), limit=60, module=canvas, settings=settings
    )
    scene.worker(concurrency=2)
    scene.call("act", name, "wait")
    scene.wait_starts(name)
    parts = Parts(scene, name)
    result = chain(parts.same, parts.plus("b")).apply_async()
    with pytest.raises(FollowTimeout, match="has not ended in time"):
        result.parent.get(timeout=SOON)
    assert scene.claim(name)
    scene.journal.open(name)
    scene.wait_free(name)
    assert scene.starts(name) == 1


def test_a_thousand_that_follow_one(own: Scene, name: str) -> None:
    """They take no slot before it has ended, and others run meanwhile."""
    own.worker(concurrency=2)
    owner = own.call("act", name, "wait")
    own.wait_starts(name)
    parts = Parts(own, name)
    results = group([parts.same] * 1000).apply_async()
    others = [own.call("act", f"{name}, other {n}") for n in range(20)]
    for other in others:
        # A thousand messages came before it.
        other.get(timeout=3 * SOON)
    wait_until(lambda: "waits in the broker for" in own.logs, SOON, lambda: own.logs)
    slots = own.journal.events("slot", name=name)
    assert [slot.data["id"] for slot in slots] == [owner.id]
    own.journal.open(name)
    assert set(results.get(timeout=60)) == {name}
    assert own.starts(name) == 1
