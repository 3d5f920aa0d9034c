"""What the signals tell is counted under the names of tasks, and asking for it fails nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from celery import Celery
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from reliable_tasks import MissingExtra, ReliableTask, dead_letters, once
from reliable_tasks._dead.keeping import tell_crash
from reliable_tasks.dead_letters import Cause, DeadLetter
from reliable_tasks.errors import StoreUnavailable
from reliable_tasks.instrumentation import prometheus, signals
from tests.unit.harness import run, take


class Sender:
    """Stands for a task."""

    name = "shop.pay"


TASK = Sender()
CLAIM = {"key": "secret", "task_id": "some-id"}
CRASH = {"task_id": "some-id", "crashes": 2, "limit": 3, "host": "w@h", "pid": 1, "at": 0.0}

_IN_TWO_PROCESSES = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from reliable_tasks.instrumentation import prometheus, signals

class Sender:
    name = "shop.pay"

registry = CollectorRegistry()
MultiProcessCollector(registry)
prometheus.install(registry, count=lambda: 7)
child = os.fork()
signals.claim_released.send(sender=Sender(), key="k", task_id="i")
if not child:
    os._exit(0)
os.waitpid(child, 0)
print(generate_latest(registry).decode())
"""


@pytest.fixture(autouse=True)
def own_receivers() -> Iterator[None]:
    """Leave the signals as they were."""
    told = [getattr(signals, name) for name in signals.__all__]
    before = [list(signal.receivers) for signal in told]
    yield
    for signal, receivers in zip(told, before, strict=True):
        signal.receivers[:] = receivers


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry that is as strict about names as the global one."""
    return CollectorRegistry(auto_describe=True)


def letter(cause: Cause = Cause.POISON, task: str = "shop.pay") -> DeadLetter:
    """Return a dead letter."""
    return DeadLetter(id="some-id", task=task, task_id="some-id", cause=cause, error="oops")


def samples(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Return what a scrape yields: the values by the labels' values, by the names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in registry.collect():
        for one in family.samples:
            if not one.name.endswith("_created"):
                found.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
    return found


def unavailable() -> int:
    """Count in vain."""
    raise StoreUnavailable("redis://h/0", "connection refused")


@pytest.mark.parametrize(
    ("signal", "sender", "told", "name", "labels", "value"),
    [
        ("task_crashed", TASK, CRASH, "task_crashes", {"task": "shop.pay"}, 1),
        (
            "dead_letter_kept",
            TASK,
            {"letter": letter()},
            "dead_letters_kept",
            {"task": "shop.pay", "cause": "poison"},
            1,
        ),
        (
            "dead_letter_replayed",
            TASK,
            {"letter": letter(), "task_id": "new-id"},
            "dead_letters_replayed",
            {"task": "shop.pay"},
            1,
        ),
        (
            "dead_letters_dropped",
            None,
            {"count": 20, "reason": "count"},
            "dead_letters_dropped",
            {"reason": "count"},
            20,
        ),
        (
            "claim_acquired",
            TASK,
            {**CLAIM, "replaced_id": None},
            "claims_acquired",
            {"task": "shop.pay"},
            1,
        ),
        ("claim_released", TASK, CLAIM, "claims_released", {"task": "shop.pay"}, 1),
        ("claim_lost", TASK, {**CLAIM, "owner": None}, "claims_lost", {"task": "shop.pay"}, 1),
        (
            "claim_conflict",
            TASK,
            {**CLAIM, "owner": "other-id", "action": "raise"},
            "claim_conflicts",
            {"task": "shop.pay", "action": "raise"},
            1,
        ),
    ],
)
def test_each_signal_is_counted(
    registry: CollectorRegistry,
    signal: str,
    sender: Any,
    told: dict[str, Any],
    name: str,
    labels: dict[str, str],
    value: int,
) -> None:
    """One counter goes up, under these labels and no others, whatever else is told one day."""
    prometheus.install(registry)
    sent = getattr(signals, signal)
    assert set(told) <= sent.providing_args
    ((_, answer),) = sent.send(sender=sender, unheard_of="some-id", **told)
    assert answer is None
    assert samples(registry) == {f"reliable_{name}_total": {tuple(labels.values()): value}}
    (sample,) = (
        one
        for family in registry.collect()
        for one in family.samples
        if one.name.endswith("_total")
    )
    assert sample.labels == labels


def test_no_signal_is_forgotten(registry: CollectorRegistry) -> None:
    """Each one has a receiver."""

    def ours(name: str) -> int:
        # Weak ones that are gone stand there, too, until another one comes.
        found = [receiver for _, receiver in getattr(signals, name).receivers]
        return sum(getattr(one, "__module__", "") == prometheus.__name__ for one in found)

    before = {name: ours(name) for name in signals.__all__}
    prometheus.install(registry)
    for name, receivers in before.items():
        assert ours(name) == receivers + 1


def test_a_run(app: Celery, registry: CollectorRegistry) -> None:
    """What the library itself sends is counted."""
    prometheus.install(registry)

    @app.task(base=ReliableTask, name="shop.pay")
    @once(key="{n}")
    def pay(n: int) -> None: ...

    pay.delay(7)
    pay.delay(7)
    run(app, take(app))
    assert samples(registry) == {
        "reliable_claims_acquired_total": {("shop.pay",): 1},
        "reliable_claim_conflicts_total": {("shop.pay", "existing"): 1},
        "reliable_claims_released_total": {("shop.pay",): 1},
    }


def test_a_crash(registry: CollectorRegistry) -> None:
    """What the library itself sends of a crash is counted."""
    prometheus.install(registry)
    tell_crash(TASK, "some-id", 2, 3, {"host": "w@h", "pid": 1, "how": "SIGKILL", "at": 0.0})
    assert samples(registry) == {"reliable_task_crashes_total": {("shop.pay",): 1}}


@pytest.mark.parametrize("cause", [Cause.UNKNOWN_TASK, Cause.UNDECODABLE])
def test_an_unknown_task_has_no_name(registry: CollectorRegistry, cause: Cause) -> None:
    """Whatever was written into the queue makes one time series, also when it is replayed."""
    prometheus.install(registry)
    for name in ("made.up", "made.up.too"):
        signals.dead_letter_kept.send(sender=None, letter=letter(cause, name))
        signals.dead_letter_replayed.send(sender=None, letter=letter(cause, name), task_id="i")
    assert samples(registry) == {
        "reliable_dead_letters_kept_total": {("", cause.value): 2},
        "reliable_dead_letters_replayed_total": {("",): 2},
    }


def test_a_task_that_this_process_does_not_know(registry: CollectorRegistry) -> None:
    """Where there is no sender the name is the letter's, which a worker knew."""
    prometheus.install(registry)
    signals.dead_letter_kept.send(sender=None, letter=letter())
    signals.dead_letter_kept.send(sender=None, letter=letter(task=""))
    found = samples(registry)["reliable_dead_letters_kept_total"]
    assert found == {("shop.pay", "poison"): 1, ("", "poison"): 1}


@pytest.mark.parametrize("name", signals.__all__)
def test_a_receiver_that_is_told_nothing(registry: CollectorRegistry, name: str) -> None:
    """It raises nothing all the same."""
    prometheus.install(registry)
    ((_, answer),) = getattr(signals, name).send(sender=None)
    assert answer is None


def test_a_second_install(registry: CollectorRegistry) -> None:
    """Nothing is registered or counted twice, and another registry has metrics of its own."""
    prometheus.install(registry, count=lambda: 7)
    prometheus.install(registry, count=lambda: 8)
    other = CollectorRegistry()
    prometheus.install(other)
    signals.claim_acquired.send(sender=TASK, **CLAIM, replaced_id=None)
    assert samples(registry) == {
        "reliable_claims_acquired_total": {("shop.pay",): 1},
        "reliable_dead_letters": {(): 7},
    }
    assert samples(other) == {"reliable_claims_acquired_total": {("shop.pay",): 1}}


def test_the_global_registry(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is prometheus_client's own unless another one is given."""
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    prometheus.install()
    signals.claim_lost.send(sender=TASK, **CLAIM, owner=None)
    assert samples(registry) == {"reliable_claims_lost_total": {("shop.pay",): 1}}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra, and nothing is connected; importing the module is no error."""
    before = [list(getattr(signals, name).receivers) for name in signals.__all__]
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reliable-tasks\[prometheus\]'") as raised:
        prometheus.install()
    assert (raised.value.package, raised.value.extra) == ("prometheus_client", "prometheus")
    assert [getattr(signals, name).receivers for name in signals.__all__] == before
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import reliable_tasks.instrumentation.prometheus"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_gauge(app: Celery, registry: CollectorRegistry) -> None:
    """It is asked for at each scrape, and not before."""
    asked: list[int] = []

    def count() -> int:
        asked.append(dead_letters.count(app=app))
        return asked[-1]

    prometheus.install(registry, count=count)
    assert asked == []
    assert samples(registry) == {"reliable_dead_letters": {(): 0}}
    assert samples(registry) == {"reliable_dead_letters": {(): 0}}
    assert asked == [0, 0]


@pytest.mark.parametrize("fail", [unavailable, lambda: 1 // 0])
def test_a_count_that_fails(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, fail: Callable[[], int]
) -> None:
    """There is no sample of it, but all the others; one warning is logged until it works again."""
    counts = [fail, fail, lambda: 7, fail]
    prometheus.install(registry, count=lambda: counts.pop(0)())
    signals.claim_released.send(sender=TASK, **CLAIM)
    released = {"reliable_claims_released_total": {("shop.pay",): 1.0}}
    with caplog.at_level(logging.WARNING, "reliable_tasks"):
        assert samples(registry) == released
        assert samples(registry) == released
        assert len(caplog.records) == 1
        assert samples(registry) == {**released, "reliable_dead_letters": {(): 7}}
        assert samples(registry) == released
    assert [one.levelname for one in caplog.records] == ["WARNING", "WARNING"]


def test_what_prometheus_reads(registry: CollectorRegistry) -> None:
    """No two metrics have the same name, to OpenMetrics either, which drops ``_total``."""
    prometheus.install(registry, count=lambda: 7)
    for name in signals.__all__:
        getattr(signals, name).send(sender=TASK, letter=letter(), reason="count", action="raise")
    names = [family.name for family in parse(openmetrics.generate_latest(registry).decode())]
    assert len(names) == len(set(names)) == len(signals.__all__) + 1
    assert b"\nreliable_dead_letters 7.0\n" in generate_latest(registry)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_children_of_a_pool(tmp_path: Path) -> None:
    """In multiprocess mode what they count is served by their parent, and only once."""
    served = subprocess.run(
        [sys.executable, "-c", _IN_TWO_PROCESSES],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert [line for line in served if line and not line.startswith("#")] == [
        'reliable_claims_released_total{task="shop.pay"} 2.0',
        "reliable_dead_letters 7.0",
    ]
