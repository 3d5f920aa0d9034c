"""Encodings are equal exactly where the values are, by a model that is written differently."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from hypothesis import example, given
from hypothesis import strategies as st

from reliable_tasks._once.encoding import encode

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([0.0, -0.0, 1.0, math.inf, math.nan]),
    st.floats(),
    st.sampled_from(["", "1", "a", "i1:1", "None", "True"]),
    st.text(),
    st.binary(max_size=4),
    st.sampled_from([Decimal(1), Decimal("1.0"), Decimal("NaN")]),
    st.sampled_from([UUID(int=0), UUID(int=1)]),
    st.datetimes(timezones=st.none() | st.just(UTC)),
    st.dates(),
    st.times(),
    st.timedeltas(),
)
hashable = scalars | st.tuples(scalars)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(hashable, inner, max_size=3),
        st.frozensets(hashable, max_size=3),
    ),
    max_leaves=8,
)


class Model:
    """A value as what the encoding should tell apart: nested tuples that Python can compare."""

    @staticmethod
    def of(value: Any) -> Any:
        """Return the comparable form of a value."""
        match value:
            case float() if math.isnan(value):
                return ("float", "nan")
            case float():
                return ("float", math.copysign(1, value), value)
            case datetime():
                return (
                    "datetime",
                    value.tzinfo is not None,
                    value.replace(tzinfo=None),
                    value.fold,
                )
            case Decimal():
                return ("Decimal", value.as_tuple())
            case list() | tuple():
                return ("sequence", tuple(map(Model.of, value)))
            case dict():
                items = [(Model.of(k), Model.of(v)) for k, v in value.items()]
                return ("mapping", Model.sort(items))
            case frozenset():
                return ("set", Model.sort(map(Model.of, value)))
            case None | bool() | int() | str() | bytes() | UUID() | date() | time() | timedelta():
                return (type(value).__name__, value)
        raise AssertionError(value)

    @staticmethod
    def sort(items: Any) -> tuple[Any, ...]:
        """Order items that do not compare with each other."""
        return tuple(sorted(items, key=repr))


@given(values, values)
@example([1, [2]], [[1], 2])
@example({"a": 1}, {("a",): 1})
@example(True, 1)
def test_encodings_are_equal_exactly_where_values_are(one: Any, other: Any) -> None:
    """No two values meet, and no value has two encodings."""
    assert (encode(one) == encode(other)) == (Model.of(one) == Model.of(other))


@given(st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_sequences_of_values_do_not_run_together(one: list[Any], other: list[Any]) -> None:
    """Encodings that stand behind each other are as distinct as the lists that they make."""
    together = b"".join(map(encode, one)) == b"".join(map(encode, other))
    assert together == (Model.of(one) == Model.of(other))


@given(st.dictionaries(hashable, values, max_size=5), st.randoms())
def test_the_order_of_a_mapping_does_not_count(value: dict[Any, Any], random: Any) -> None:
    """Keyword arguments and dicts come in any order."""
    items = list(value.items())
    random.shuffle(items)
    assert encode(dict(items)) == encode(value)
