"""Each private part of Celery, kombu and billiard that this library rests on, pinned.

A test that fails here after an upgrade says which assumption of ``reliable_tasks`` has moved.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from billiard import pool as billiard_pool
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, Task, bootsteps, shared_task, states
from celery.app.trace import TraceInfo
from celery.concurrency import asynpool, prefork
from celery.exceptions import Ignore, Reject, Retry
from celery.local import PromiseProxy, Proxy, maybe_evaluate
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from kombu import Connection
from kombu.asynchronous import Hub

from reliable_tasks._celery.settings import explicit
from reliable_tasks.demo._server import EmbeddedServer
from tests.integration.apps.journal import Event, Journal
from tests.integration.apps.witness import NEEDED
from tests.support import WorkerProcess, wait_until
from tests.unit.conftest import own_celery  # noqa: F401 - shared tasks would reach later apps


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app that is neither configured nor finalized."""
    with Celery("pins", broker="memory://", set_as_current=False) as app:
        yield app


def _pin() -> None:
    pass


class TestRequest:
    """``celery.worker.request``: the main process' side of a message."""

    def test_what_is_overridden_exists(self) -> None:
        """ReliableRequest replaces these methods, with these arguments."""
        assert list(inspect.signature(Request.revoked).parameters) == ["self"]
        assert list(inspect.signature(Request.reject).parameters) == ["self", "requeue"]
        assert list(inspect.signature(Request.on_failure).parameters) == [
            *("self", "exc_info", "send_failed_event", "return_ok")
        ]

    @pytest.mark.parametrize("name", ["_already_revoked", "_already_cancelled", "acknowledged"])
    def test_flags_that_are_read(self, name: str) -> None:
        """They are false on a request that nothing has happened to."""
        assert getattr(Request, name) is False

    def test_time_limits(self) -> None:
        """The hard limit that the call asked for, then the soft one."""
        assert Request.time_limits == (None, None)

    @pytest.mark.parametrize("name", ["_context", "store_errors", "request_dict", "message", "app"])
    def test_values_that_are_read(self, name: str) -> None:
        """They are properties of a request."""
        assert isinstance(inspect.getattr_static(Request, name), (property, _CACHED))

    def test_celery_overrides_two_methods_only(self, app: Celery) -> None:
        """create_request_cls puts its own class before ours, which must not lose a hook."""
        task = app.task(_pin, name="pin", shared=False)
        made = create_request_cls(Request, maybe_evaluate(task), Mock(), "host", None, app=app)
        own = {name for name, value in vars(made).items() if inspect.isfunction(value)}
        assert own == {"execute_using_pool", "on_success"}

    def test_a_fast_request_asks_whether_it_was_revoked(self) -> None:
        """That is where a message that was held for too long is kept from starting."""
        assert "self.revoked()" in inspect.getsource(create_request_cls)
        assert "self.revoked()" in inspect.getsource(Request.execute_using_pool)

    def test_a_failure_of_the_childs_own_is_marked(self) -> None:
        """on_success passes it on with return_ok, which tells it from a child that is gone."""
        assert "return_ok=True" in inspect.getsource(create_request_cls)
        assert "return_ok=True" in inspect.getsource(Request.on_success)

    def test_what_was_handed_to_a_pool_is_known(self) -> None:
        """``_apply_result`` is set by that and by nothing else."""
        assert Request._apply_result is None
        assert "self._apply_result = maybe(ref, result)" in inspect.getsource(
            Request.execute_using_pool
        )

    def test_the_body_of_a_message(self) -> None:
        """``_payload`` is arguments, keyword arguments and what is embedded, decoded or not."""
        source = inspect.getsource(Request)
        assert "self._body if self._decoded else message.payload" in source
        assert "_, _, embed = self._payload" in source

    def test_task_ready(self) -> None:
        """It takes a request out of what the worker believes to be running."""
        assert callable(state.task_ready)
        assert next(iter(inspect.signature(state.task_ready).parameters)) == "request"


_CACHED = type(inspect.getattr_static(Request, "_context"))


class TestBilliard:
    """What a pool tells the main process."""

    def test_errors_come_wrapped(self) -> None:
        """A child's error arrives as ExceptionWithTraceback around the error itself."""
        with pytest.raises(ValueError, match="x") as caught:
            raise ValueError("x")
        info = ExceptionInfo((caught.type, caught.value, caught.tb))
        assert isinstance(info.exception, ExceptionWithTraceback)
        assert info.exception.exc is caught.value

    def test_lost_and_timed_out(self) -> None:
        """The pool reports both with errors of these types."""
        assert issubclass(TimeLimitExceeded, Exception)
        assert issubclass(WorkerLostError, Exception)

    def test_a_set_aside_is_a_reject(self) -> None:
        """trace_task answers a Reject without storing anything, and hands it on as it is."""
        source = inspect.getsource(inspect.getmodule(TraceInfo))
        assert "except Reject as exc:" in source
        assert issubclass(Reject, Exception)
        for other in (Ignore, Retry):
            assert not issubclass(Reject, other)


class TestKombu:
    """kombu's Redis transport."""

    def test_a_message_can_be_forgotten(self, redis_url: str, redis_client: redis.Redis) -> None:
        """_quick_ack drops it here and leaves it with the broker, which brings it back."""
        options = {"visibility_timeout": 77}
        with Connection(redis_url, transport_options=options) as connection:
            queue = connection.SimpleQueue("pin")
            queue.put("hello")
            message = queue.get(timeout=5)
            channel = message.channel
            assert channel.unacked_key == "unacked"
            assert channel.visibility_timeout == 77
            assert message.delivery_tag in channel.qos._delivered
            channel.qos._quick_ack(message.delivery_tag)
            channel.qos._flush()
            assert message.delivery_tag not in channel.qos._delivered
            assert redis_client.hexists("unacked", message.delivery_tag)
            queue.close()

    def test_only_redis_has_an_unacked_key(self) -> None:
        """By it a message from Redis is told from others."""
        with Connection("memory://") as connection:
            assert not hasattr(connection.channel(), "unacked_key")


class TestApp:
    """``celery.Celery``: its tasks and its settings."""

    def test_known_tasks_do_not_finalize(self, app: Celery) -> None:
        """_tasks is the registry; app.tasks would make all tasks."""
        assert app._tasks is not None
        assert app.finalized is False
        assert app.tasks is app._tasks
        assert app.finalized is True

    def test_configured_is_known_without_asking(self, app: Celery) -> None:
        """It turns true when the settings are first read."""
        assert app.configured is False
        assert app.conf.broker_url
        assert app.configured is True

    def test_settings_are_a_chain_that_ends_with_the_defaults(self, app: Celery) -> None:
        """What the user set stands in the maps before the last."""
        assert app.conf.broker_url, "the first access reads what was set before"
        app.conf.task_acks_late = True
        assert any(mapping.get("task_acks_late") for mapping in app.conf.maps[:-1])
        assert app.conf.maps[-1]["task_acks_late"] is False
        assert "worker_prefetch_multiplier" not in {
            name for mapping in app.conf.maps[:-1] for name in mapping
        }

    def test_a_settings_name_in_a_namespace(self) -> None:
        """_to_keys knows a setting's name with the app's namespace."""
        with Celery("pins", set_as_current=False) as app:
            app.config_from_object({"CELERY_TASK_ACKS_LATE": True}, namespace="CELERY")
            assert app.conf.task_acks_late is True
            assert "CELERY_TASK_ACKS_LATE" in app.conf._to_keys("task_acks_late")

    def test_a_settings_old_name(self) -> None:
        """An explicit setting of the user's counts also by the name it had before Celery 4."""
        with Celery("pins", set_as_current=False) as app:
            app.config_from_object({"CELERY_ACKS_LATE": False})
            assert explicit(app, "task_acks_late") == (True, False)

    def test_worker_steps_can_be_added(self, app: Celery) -> None:
        """app.steps["worker"] is a set of classes that a worker makes before it connects."""
        app.steps["worker"].add(bootsteps.Step)
        assert bootsteps.Step in app.steps["worker"]


class TestTaskCreation:
    """How Celery makes a task of a function."""

    def test_a_task_is_lazy(self, app: Celery) -> None:
        """app.task returns a PromiseProxy, whose __then__ runs when the task is made."""
        made: list[str] = []

        @app.task(shared=False)
        def pin() -> None:
            """Do nothing."""

        assert type(pin) is PromiseProxy
        pin.__then__(lambda: made.append("made"))
        assert made == []
        assert isinstance(maybe_evaluate(pin), Task)
        assert made == ["made"]

    def test_a_shared_task_is_a_proxy_of_another_kind(self) -> None:
        """@once above it can tell, without making the task."""

        @shared_task(name="tests.pin.shared")
        def pin() -> None:
            """Do nothing."""

        assert type(pin) is Proxy

    def test_the_docstring_moves_into_the_class(self, app: Celery) -> None:
        """The very object, so that __set_name__ tells it of the class it became part of."""
        owners: list[tuple[type, str]] = []

        class Doc(str):
            __slots__ = ()

            def __set_name__(self, owner: type, name: str) -> None:
                owners.append((owner, name))

        def pin() -> None:
            pass

        pin.__doc__ = Doc("A pin.")
        task = maybe_evaluate(app.task(pin, shared=False))
        assert owners == [(type(task), "__doc__")]

    def test_the_class_is_bound_after_it_was_made(self, app: Celery) -> None:
        """bind and on_bound are class methods that see the app."""
        seen: list[Any] = []

        class Base(Task):
            abstract = True

            @classmethod
            def on_bound(cls, app: Celery) -> None:
                seen.append(app)

        maybe_evaluate(app.task(_pin, base=Base, name="pin", shared=False))
        assert app in seen

    def test_the_function_is_run_of_the_class(self, app: Celery) -> None:
        """A bound function is the method itself, an unbound one a staticmethod."""

        def pin(self: Task) -> None:
            pass

        bound = type(maybe_evaluate(app.task(pin, bind=True, name="bound", shared=False)))
        free = type(maybe_evaluate(app.task(pin, name="free", shared=False)))
        assert vars(bound)["run"] is pin
        assert isinstance(vars(free)["run"], staticmethod)


@pytest.fixture(scope="module")
def events(
    tmp_path_factory: pytest.TempPathFactory, module_redis: EmbeddedServer
) -> Iterator[list[Event]]:
    """Run one task for each way to end."""
    directory: Path = tmp_path_factory.mktemp("witness")
    url = f"redis://127.0.0.1:{module_redis.port}"
    worker = WorkerProcess(
        "tests.integration.apps.witness",
        broker_url=f"{url}/2",
        result_url=f"{url}/3",
        env={"RT_JOURNAL": str(directory)},
    )
    journal = Journal(directory)
    ways = ["SUCCESS", "FAILURE", "IGNORED", "REJECTED", "RETRY"]
    with worker, Celery(broker=f"{url}/2", backend=f"{url}/3", set_as_current=False) as client:
        for way in ways:
            client.send_task("end", (way,))
        wait_until(lambda: len(journal.events("postrun")) == len(ways) + 1, 10, lambda: worker.log)
        yield journal.events()


class TestSignals:
    """What a real worker's signals bring, written down by an app of Celery's own."""

    def test_a_task_is_started_by_the_consumer(self, events: list[Event]) -> None:
        """It has the prefetch count, the timer and the channel that a copy set aside needs."""
        received = [event.data for event in events if event.name == "received"]
        assert received
        for data in received:
            assert data["consumer"] == f"{Consumer.__module__}.{Consumer.__qualname__}"
            assert data["is_known"]
            assert data["has"] == list(NEEDED)

    @pytest.mark.parametrize("way", ["SUCCESS", "FAILURE", "IGNORED", "REJECTED", "RETRY"])
    def test_postrun_says_how_a_run_ended(self, events: list[Event], way: str) -> None:
        """The state is one of those that end a run, and the sender is the task."""
        assert getattr(states, way) == way
        (*_, event) = [e for e in events if e.name == "postrun" and e.data["state"] == way][:1]
        assert event.data["is_the_task"]

    @pytest.mark.parametrize("way", ["SUCCESS", "FAILURE", "RETRY"])
    def test_postrun_comes_after_the_result_was_stored(self, events: list[Event], way: str) -> None:
        """A key is freed when the result can be read, not before."""
        (*_, event) = [e for e in events if e.name == "postrun" and e.data["state"] == way][:1]
        assert event.data["stored"] == way

    def test_a_request_can_tell_its_child_something(self, events: list[Event]) -> None:
        """What our request adds to its headers in the main process is read in the child."""
        for event in events:
            if event.name == "postrun":
                assert event.data["token"]
                assert event.data["token"] != event.pid


class TestTransfers:
    """billiard and Celery's ``asynpool``: what main process and children are in the midst of."""

    def test_a_job_knows_what_writes_it(self) -> None:
        """As a weak reference, and the child that it is written to."""
        source = inspect.getsource(asynpool)
        assert "job._writer = ref(cor)" in source
        assert "job._write_to = proc" in source
        assert "proc.inqW_fd" in source

    def test_the_pool_knows_its_jobs_and_pipes(self) -> None:
        """By the names that are read."""
        assert "self._fileno_to_outq = {}" in inspect.getsource(asynpool.AsynPool.__init__)
        assert "self._cache = {}" in inspect.getsource(billiard_pool.Pool.__init__)

    def test_the_end_of_a_child_is_an_event(self) -> None:
        """Whose handler is looked up on the pool for each child, and looks for it once."""
        handler = asynpool.AsynPool._event_process_exit
        assert list(inspect.signature(handler).parameters) == ["self", "hub", "proc"]
        assert "self.maintain_pool()" in inspect.getsource(handler)
        tracks = inspect.getsource(asynpool.AsynPool._track_child_process)
        assert "self._event_process_exit, hub, proc)" in tracks
        assert "self._pool = []" in inspect.getsource(billiard_pool.Pool.__init__)
        assert "self._pool" in inspect.getsource(prefork.TaskPool.on_start)

    def test_what_reads_a_result_is_a_generator(self) -> None:
        """The event loop keeps it as the callback of its pipe."""
        hub = Hub()
        try:
            reader = (number for number in range(3))
            with socket.socket() as end:
                hub.add_reader(end, reader)
                assert hub.readers == {end.fileno(): (reader, ())}
                hub.reset()
                assert hub.readers == {}
        finally:
            hub.close()

    def test_exit_codes_stand_for_a_shutdown(self) -> None:
        """``None`` and ``False`` are none, and 0 is one."""
        assert state.should_stop is None
        assert state.should_terminate is None
        source = inspect.getsource(state.maybe_shutdown)
        assert "should_stop is not None and should_stop is not False" in source
