"""Metrics for Prometheus, made of this library's signals: the extra ``prometheus``.

::

    @worker_init.connect
    def count(**kwargs):
        prometheus.install(count=partial(dead_letters.count, app=app))

    @worker_ready.connect
    def serve(**kwargs):
        prometheus_client.start_http_server(9100)

A counter, ``reliable_..._total``, is raised in the process where its signal is sent, if that has
called `install` or is a fork of one that had:

- ``task_crashes``, ``dead_letters_kept`` and ``dead_letters_dropped``: the worker's main process.
- ``claims_acquired`` and ``claim_conflicts``: who calls the task, a web server for example; and
  who runs it, where it takes its turn or finds its key taken as it starts.
- ``claims_released`` and ``claims_lost``: who runs the task; the worker's main process for one
  that did not run to its end.
- ``dead_letters_replayed``: who replays them. What a command counts is gone when it ends.

All pools but prefork run tasks in the worker's main process. The children of a prefork pool count
for themselves, and nobody asks them: that needs prometheus_client's multiprocess mode. Set
``PROMETHEUS_MULTIPROC_DIR`` before Python starts, to a directory of this worker's own that is
emptied before each start, and serve what all of its processes have written there::

    registry = CollectorRegistry()

    @worker_init.connect
    def count(**kwargs):
        MultiProcessCollector(registry)
        prometheus.install(registry, count=partial(dead_letters.count, app=app))

    @worker_ready.connect
    def serve(**kwargs):
        prometheus_client.start_http_server(9100, registry=registry)

The gauge ``reliable_dead_letters`` is of all workers: take the ``max`` of what they say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from reliable_tasks.errors import MissingExtra
from reliable_tasks.instrumentation import signals as on

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter
    from prometheus_client.core import GaugeMetricFamily

__all__ = ["install"]

logger = logging.getLogger("reliable_tasks")

_COUNTERS = (
    (on.task_crashed, "task_crashes_total", ("task",), "Crashes of tasks."),
    # Not dead_letters_total: OpenMetrics would have that and the gauge be of one name.
    (on.dead_letter_kept, "dead_letters_kept_total", ("task", "cause"), "Dead letters kept."),
    (on.dead_letter_replayed, "dead_letters_replayed_total", ("task",), "Dead letters replayed."),
    (on.dead_letters_dropped, "dead_letters_dropped_total", ("reason",), "Dead letters dropped."),
    (on.claim_acquired, "claims_acquired_total", ("task",), "Keys taken."),
    (on.claim_released, "claims_released_total", ("task",), "Keys freed."),
    (on.claim_lost, "claims_lost_total", ("task",), "Tasks that ended without their claim."),
    (on.claim_conflict, "claim_conflicts_total", ("task", "action"), "Keys found taken."),
)
#: Anybody can write any name into a queue, and each would be a time series of its own.
_OF_UNKNOWN_TASKS = ("unknown_task", "undecodable")

_installed: WeakSet[CollectorRegistry] = WeakSet()


def install(
    registry: CollectorRegistry | None = None, *, count: Callable[[], int] | None = None
) -> None:
    """Count what the signals tell from now on; a second time for a registry, do nothing.

    Args:
        registry: Where the metrics are registered; prometheus_client's global one by default. In
            multiprocess mode that is the gauge alone, for the counters are written to files.
        count: Asked for the gauge ``reliable_dead_letters`` at each scrape, in the thread that
            serves it: ``partial(dead_letters.count, app=app)``. Without it there is no gauge.

    Raises:
        MissingExtra: prometheus_client is not installed.
    """
    try:
        from prometheus_client import REGISTRY, Counter, values
    except ImportError:
        raise MissingExtra("prometheus_client", "prometheus") from None
    registry = REGISTRY if registry is None else registry
    if registry in _installed:
        return
    # A MultiProcessCollector in the same registry tells of the counters, too.
    shown = registry if values.ValueClass is values.MutexValue else None
    for signal, name, labels, about in _COUNTERS:
        counter = Counter(name, about, labels, namespace="reliable", registry=shown)
        signal.connect(_receiver(counter, labels), weak=False)
    if count is not None:
        registry.register(_DeadLetters(count))
    _installed.add(registry)


def _receiver(counter: Counter, labels: tuple[str, ...]) -> Callable[..., None]:
    def receive(sender: Any = None, letter: Any = None, count: int = 1, **told: Any) -> None:
        values = {"task": _task_name(sender, letter), "cause": getattr(letter, "cause", ""), **told}
        counter.labels(*(values.get(label, "") for label in labels)).inc(count)

    return receive


def _task_name(sender: Any, letter: Any) -> str:
    if getattr(letter, "cause", None) in _OF_UNKNOWN_TASKS:
        return ""
    # Who replays a dead letter need not know its task: then there is no sender.
    return str(getattr(sender, "name", None) or getattr(letter, "task", ""))


class _DeadLetters:
    """How many dead letters there are, asked at each scrape."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._has_failed = False

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauge without a value: a registry would ask for it to learn the name."""
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily("reliable_dead_letters", "Dead letters that were not replayed.")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauge, without a value if nobody knows it."""
        for gauge in self.describe():
            try:
                gauge.add_metric([], self._count())
                self._has_failed = False
            except Exception:
                # An error here would cost the scrape all other metrics. Said once, not each time.
                if not self._has_failed:
                    logger.warning("The dead letters cannot be counted", exc_info=True)
                self._has_failed = True
            yield gauge
