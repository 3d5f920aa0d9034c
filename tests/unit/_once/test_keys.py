"""From a call to its key: one call one key, and templates that cannot go wrong later."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest

from reliable_tasks import ConfigError
from reliable_tasks._once.keys import Key
from reliable_tasks._store.keys import Keys

TASK = "shop.tasks.send_invoice"


@dataclass
class Order:
    """Something with attributes."""

    id: int
    lines: list[int] = field(default_factory=list)


def key_of(spec: Any, function: Any = lambda a, b=2: None) -> Key:
    """A key for a task with this body."""
    return Key(spec, inspect.signature(function), TASK)


def name(spec: Any, *args: Any, **kwargs: Any) -> str:
    """The name of a call of ``f(a, b=2)``."""
    return key_of(spec).name(TASK, args, kwargs)


@pytest.mark.parametrize("spec", [None, "{a}:{b}", lambda a, b=2: [a, b]])
def test_five_spellings_of_a_call_have_one_key(spec: Any) -> None:
    """Positional, by keyword, with a default written out: one call."""
    spellings = [
        name(spec, 1),
        name(spec, a=1),
        name(spec, 1, 2),
        name(spec, 1, b=2),
        name(spec, b=2, a=1),
    ]
    assert len(set(spellings)) == 1


@pytest.mark.parametrize("spec", [None, "{a}", lambda a, b=2: a])
def test_types_make_keys(spec: Any) -> None:
    """A number, its text, a truth value and a fraction are four keys."""
    assert len({name(spec, value) for value in (1, "1", True, 1.0)}) == 4


def test_a_large_argument_makes_a_small_key() -> None:
    """A key's length does not follow from its arguments."""
    keys = Keys("some-prefix:reliable:")
    large = "ü" * 1_048_576
    for spec in (None, "{a}", lambda a, b=2: a):
        made = name(spec, large)
        assert len(made.encode()) <= 150
        assert len(keys.claim(made).encode()) < 200
    long_name = key_of("{a}").name("package." * 100, (large,), {})
    assert len(keys.claim(long_name).encode()) < 200


def test_a_key_is_readable_in_front() -> None:
    """Who looks into Redis sees the task and what the template made."""
    readable, _, digest = name("invoice:{a}", 7).rpartition(":")
    assert readable == f"{TASK}:invoice:7"
    assert len(digest) == 32
    assert name(None, 7).startswith(f"{TASK}:")
    assert name(lambda a, b=2: f"by-{a}", 7).startswith(f"{TASK}:by-7:")


def test_a_key_holds_nothing_that_redis_reads_into() -> None:
    """Braces, blanks and newlines of an argument stay out of the key."""
    assert set(name("{a}", "{x}\n *") or "") & set("{}\n *") == set()


def test_keys_of_two_tasks_never_meet() -> None:
    """The same template over the same arguments is another key for another task."""
    key = key_of("{a}")
    assert key.name("one", (1,), {}) != key.name("two", (1,), {})


def test_the_kind_of_key_is_part_of_it() -> None:
    """A template, a function and all arguments do not meet by chance."""
    function = key_of(lambda a: [1], lambda a: None).name(TASK, (1,), {})
    everything = key_of(None, lambda a: None).name(TASK, (1,), {})
    template = key_of("{a}", lambda a: None).name(TASK, (1,), {})
    assert len({function.split(":")[-1], everything.split(":")[-1], template.split(":")[-1]}) == 3


@pytest.mark.parametrize(
    ("template", "label"),
    [
        ("{order.id}", "7"),
        ("{order.lines[1]}", "4"),
        ("{items[key]}", "x"),
        ("{items[0]}", "zero"),
        ("{items[_private]}", "item"),
        ("{order.id:05d}", "00007"),
        ("{order.id!r:>3}", "__7"),
        ("{order.id!s}", "7"),
        ("{{literal}}{order.id}", "_literal_7"),
    ],
)
def test_a_template_reaches_into_arguments(template: str, label: str) -> None:
    """Attributes, items, conversions and formats work as in ``str.format``."""
    key = key_of(template, lambda order, items: None)
    items = {"key": "x", 0: "zero", "_private": "item"}
    assert key.name("t", (Order(7, [3, 4]), items), {}).startswith(f"t:{label}:")


@pytest.mark.parametrize(
    ("template", "order"),
    [
        ("{order.id}", {"id": 7}),
        ("{order[id]}", {"id": 7}),
        ("{order[7]}", {7: 7}),
        ("{order[7]}", {"7": 7}),
    ],
)
def test_a_mapping_stands_for_what_it_was(template: str, order: Any) -> None:
    """A model of the caller is plain data in the message."""
    key = key_of(template, lambda order: None)
    assert key.name("t", (order,), {}).startswith("t:7:")


def test_only_what_a_template_names_counts() -> None:
    """Other arguments may differ."""
    assert name("{a}", 1, 2) == name("{a}", 1, 3)
    key = key_of("{order.id}", lambda order: None)
    assert key.name("t", (Order(7, [1]),), {}) == key.name("t", (Order(7, [2]),), {})


def test_a_formatted_value_is_text() -> None:
    """Who formats a value asks for its text, so types no longer count."""
    assert name("{a!s}", 1) == name("{a!s}", "1")
    assert name("{a:>3}", 1) == name("{a:>3}", " 1")


def test_values_of_a_template_do_not_run_together() -> None:
    """What stands beside each other in the label is apart in the key."""
    assert name("{a}{b}", "x", "yz") != name("{a}{b}", "xy", "z")
    assert name("{a}-{b}", "x-y", "z") != name("{a}-{b}", "x", "y-z")


def test_star_arguments_can_be_named() -> None:
    """``*args`` and ``**kwargs`` are parameters like others."""
    key = key_of("{rest[0]}:{named[x]}", lambda *rest, **named: None)
    assert key.name("t", (1, 2), {"x": 3}).startswith("t:1:3:")
    key = key_of(None, lambda *rest, **named: None)
    assert key.name("t", (1,), {"x": 3, "y": 4}) == key.name("t", (1,), {"y": 4, "x": 3})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{c}", "'c' is no parameter of the task; known are a, b"),
        ("{c.id}", "'c' is no parameter"),
        ("{}", "'' is no parameter"),
        ("{0}", "'0' is no parameter"),
        ("{self}", "'self' is no parameter"),
        ("{a._secret}", "'_secret' is private"),
        ("{a.b.__class__}", "'__class__' is private"),
        ("{a", "not a template: expected '}'"),
        ("a}", "not a template: Single '}'"),
        ("{a.}", "'a.' is no path; write a.attribute, a[item] or both"),
        ("{a[]}", "is no path"),
        ("{a..b}", "is no path"),
        ("{a[0]b}", "is no path"),
        ("{a!z}", "there is no conversion 'z'"),
        ("{a:{b}}", "a format must be written out, not computed"),
        ("constant", "names no parameter, so every call would have one key; known are a, b"),
        ("{{a}}", "names no parameter"),
        ("", "names no parameter"),
    ],
)
def test_a_wrong_template_is_refused_at_once(template: str, words: str) -> None:
    """The message names the template, the task and what would be right."""
    with pytest.raises(ConfigError) as caught:
        key_of(template)
    assert words in str(caught.value)
    assert f"@once(key={template!r}) on {TASK}" in str(caught.value)


def test_a_constant_is_right_where_there_are_no_parameters() -> None:
    """A task without parameters has one call, so one key is what it needs."""
    assert key_of("nightly", lambda: None).name("t", (), {}).startswith("t:nightly:")
    with pytest.raises(ConfigError, match="known are none"):
        key_of("{a}", lambda: None)


@pytest.mark.parametrize("spec", [7, b"x", ["a"]])
def test_what_is_no_key_is_refused(spec: Any) -> None:
    """A key is a template, a function or nothing."""
    with pytest.raises(ConfigError, match="give a template string, a function, or nothing"):
        key_of(spec)


def test_a_function_gets_the_call_with_its_defaults() -> None:
    """It may name its parameters as it likes."""
    seen = []

    def key(*args: Any, **kwargs: Any) -> int:
        seen.append((args, kwargs))
        return 0

    key_of(key, lambda a, b=2, *, c=3: None).name("t", (1,), {})
    assert seen == [((1, 2), {"c": 3})]


def test_a_call_that_does_not_fit_is_refused_as_python_does() -> None:
    """Missing and surplus arguments are errors of the caller, at the call."""
    for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"d": 4})]:
        with pytest.raises(TypeError):
            key_of(None).name(TASK, args, kwargs)


def test_no_arguments_can_be_given_as_none() -> None:
    """``apply_async()`` hands on None where a call has no arguments."""
    key = key_of(None, lambda: None)
    assert key.name("t", None, None) == key.name("t", (), {})  # type: ignore[arg-type]
