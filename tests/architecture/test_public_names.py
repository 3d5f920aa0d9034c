"""The facade: what may be imported from the root, and nothing else."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import reliable_tasks

SNAPSHOT = Path(__file__).with_name("public_names.txt")


def test_the_public_names_are_those_that_were_agreed() -> None:
    """A public name comes or goes only together with a change of the committed list."""
    assert sorted(reliable_tasks.__all__) == SNAPSHOT.read_text().split()


def test_all_lists_exactly_what_is_public() -> None:
    """Nothing public is left out of ``__all__``, and nothing in it is missing."""
    for name in reliable_tasks.__all__:
        assert hasattr(reliable_tasks, name), name
    public = {
        name
        for name, value in vars(reliable_tasks).items()
        if not name.startswith("_")
        # Importing a submodule anywhere makes it an attribute here.
        and not isinstance(value, types.ModuleType)
        # What the facade itself needs from elsewhere, e.g. `Any`.
        and getattr(value, "__module__", reliable_tasks.__name__).startswith("reliable_tasks")
    }
    assert public <= set(reliable_tasks.__all__)


def test_an_exported_name_is_never_a_module_too() -> None:
    """``from reliable_tasks import once`` means one thing, whatever was imported before."""
    for name in reliable_tasks.__all__:
        if importlib.util.find_spec(f"reliable_tasks.{name}"):
            assert isinstance(getattr(reliable_tasks, name), types.ModuleType), name


def test_every_public_name_explains_itself() -> None:
    """Whatever is callable and public has a docstring."""
    for name in reliable_tasks.__all__:
        value = getattr(reliable_tasks, name)
        if callable(value):
            assert value.__doc__, name
