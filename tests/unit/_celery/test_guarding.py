"""Whether a message that waited in the worker may still start."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from celery import Celery

from reliable_tasks._celery.request import ReliableRequest
from tests.unit._celery.bench import Bench
from tests.unit.harness import claims


class TestHeldForTooLong:
    """Stock kombu hands a message on a visibility_timeout after it was fetched."""

    @pytest.fixture
    def hold(self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Receive a message from kombu's Redis transport and hold it for a while."""

        def hold(
            seconds: float, timeout: float = 100, *, is_ours: bool = True, is_up: bool = True
        ) -> tuple[ReliableRequest, list[str]]:
            send.delay(7)
            forgotten: list[str] = []
            fake = fakeredis.FakeServer()
            server = fakeredis.FakeRedis(server=fake)
            channel = SimpleNamespace(
                unacked_key="unacked",
                unacked_index_key="unacked_index",
                visibility_timeout=timeout,
                qos=SimpleNamespace(_quick_ack=forgotten.append),
                conn_or_acquire=lambda: nullcontext(server),
            )
            request = bench.receive(channel=channel)
            if is_ours:
                server.zadd("unacked_index", {request.message.delivery_tag: 1})
            fake.connected = is_up
            monkeypatch.setattr(request, "_received_at", time.monotonic() - seconds)
            self.score = lambda: server.zscore("unacked_index", request.message.delivery_tag)
            return request, forgotten

        return hold

    def test_it_starts_while_there_is_time(self, hold: Any) -> None:
        """100 s, less 60 for the run, less half of the margin."""
        request, _ = hold(30)
        assert not request.revoked()
        assert self.score() == 1

    def test_its_time_begins_anew_when_the_rest_is_too_short(self, hold: Any) -> None:
        """As long as the broker counts it as ours."""
        request, _ = hold(40)
        assert not request.revoked()
        assert self.score() == pytest.approx(time.time(), abs=5)

    @pytest.mark.parametrize(
        ("seconds", "options"), [(96, {}), (40, {"is_ours": False}), (40, {"is_up": False})]
    )
    def test_it_is_left_to_its_redelivery(
        self, bench: Bench, app: Celery, hold: Any, seconds: float, options: Any
    ) -> None:
        """Where the broker may have passed it on, it is neither run nor given back."""
        request, forgotten = hold(seconds, **options)
        assert request.revoked()
        assert (bench.ended, forgotten) == ([], [request.message.delivery_tag])
        assert request.acknowledged
        assert len(claims(app)) == 1

    def test_a_timeout_below_the_limit_is_used_as_far_as_it_goes(self, hold: Any) -> None:
        """Refusing whatever cannot end in time would refuse for ever."""
        request, _ = hold(40, timeout=50)
        assert not request.revoked()

    def test_other_transports_hand_nothing_on(
        self, bench: Bench, send: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only kombu's Redis transport has the timeout."""
        send.delay(7)
        request = bench.receive()
        monkeypatch.setattr(request, "_received_at", -1e9)
        assert not request.revoked()
