"""Arguments are encoded by type and value, and nothing runs together."""

from __future__ import annotations

import enum
import uuid
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pydantic
import pytest

from reliable_tasks._once.encoding import digest, encode


class Colour(enum.Enum):
    """An enum that a serializer sends as its value."""

    RED = "red"
    ONE = 1


class Text(str, enum.Enum):  # noqa: UP042 - the older spelling is still everywhere
    """An enum that is a string too."""

    RED = "red"


class Flags(enum.IntFlag):
    """An enum that is a number too."""

    A = 1
    B = 2


@dataclass
class Point:
    """A dataclass."""

    x: int
    y: int = 0


@dataclass
class Pixel:
    """Another dataclass with the same fields."""

    x: int
    y: int = 0


class Model(pydantic.BaseModel):
    """A pydantic model."""

    a: int
    b: list[str] = []


class Other(pydantic.BaseModel):
    """Another with the same fields."""

    a: int
    b: list[str] = []


class Jsonable:
    """What kombu serializes by asking it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __json__(self) -> Any:
        return self.value


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - the untyped kind is the commoner one

DISTINCT: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    10**30,
    2**5000,
    1.0,
    0.0,
    -0.0,
    0.1,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "1",
    "True",
    "None",
    "i1:1",
    "ü",
    "\udc80",
    "a\x00b",
    b"",
    b"1",
    [],
    {},
    set(),
    [1],
    ["1"],
    [[1]],
    [1, 2],
    [2, 1],
    [[1], 2],
    [[1, 2]],
    {1: 2},
    {"1": 2},
    {1: "2"},
    {1: {2: 3}},
    {1: 2, "1": 2},
    {1: 2, None: 3, "x": [4], (5, 6): {7}},
    {1, 2},
    {1, 2, 3},
    {"1", "2"},
    datetime(2026, 1, 2),  # noqa: DTZ001 - a naive one must work too
    datetime(2026, 1, 2, tzinfo=UTC),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=1))),
    date(2026, 1, 2),
    time(1, 2),
    time(1, 2, tzinfo=UTC),
    timedelta(seconds=1),
    timedelta(days=1),
    timedelta(microseconds=1),
    Decimal(1),
    Decimal("1.0"),
    uuid.UUID(int=1),
    str(uuid.UUID(int=1)),
    Point(1),
    Point(1, 1),
    Pixel(1),
    {"x": 1, "y": 0},
    Model(a=1),
    Model(a=2),
    Other(a=1),
    {"a": 1, "b": []},
]


def test_different_values_are_encoded_differently() -> None:
    """No type is mistaken for another, and no nesting for its flat form."""
    encodings = [encode(value) for value in DISTINCT]
    assert len(set(encodings)) == len(encodings)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        (Pair(1, 2), [1, 2]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (OrderedDict(b=2, a=1), {"a": 1, "b": 2}),
        (UserDict(a=1), {"a": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ({3, 1, 2}, frozenset([2, 3, 1])),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        (Colour.RED, "red"),
        (Colour.ONE, 1),
        (Text.RED, "red"),
        (Flags.A | Flags.B, 3),
        (Jsonable({"a": 1}), {"a": 1}),
        (Point(1), Point(1, 0)),
        (Model(a=1), Model(a=1, b=[])),
        (float("nan"), float("nan")),
    ],
)
def test_what_a_worker_sees_as_one_is_encoded_as_one(one: Any, other: Any) -> None:
    """What serializers do not tell apart makes no second key."""
    assert encode(one) == encode(other)
    assert digest(one) == digest(other)


def test_pieces_do_not_run_together() -> None:
    """No value can be written so that it looks like two."""
    assert digest("a", "b") != digest("ab", "")
    assert digest("a", "b") != digest("as1:b")
    assert digest(["a"], "b") != digest(["a", "b"])
    assert encode({"a": "b"}) != encode(["a", "b"])


def test_a_digest_has_one_length() -> None:
    """Whatever goes in, 128 bits come out."""
    assert len(digest("x" * 1_000_000)) == len(digest()) == 32


@pytest.mark.parametrize(
    "value", [object(), SimpleNamespace(a=1), Point, len, iter([]), {"deep": [object()]}]
)
def test_what_has_no_stable_value_is_refused(value: Any) -> None:
    """An address in memory would make a new key of every call."""
    with pytest.raises(TypeError, match="has no stable value to build a @once key from"):
        encode(value)


def test_the_refusal_names_the_type_and_the_fix() -> None:
    """Who reads the message knows which argument it is about and what to write."""
    with pytest.raises(TypeError) as caught:
        encode(SimpleNamespace())
    assert "a types.SimpleNamespace" in str(caught.value)
    assert "@once(key='order:{order.id}')" in str(caught.value)
    assert "@once(key=lambda order: order.id)" in str(caught.value)
