"""What happens to messages that concerns others, of whom the broker's side knows nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["set_apart", "thrown"]


class Listeners:
    """Those who are told when something happens."""

    def __init__(self) -> None:
        self._all: list[Callable[..., Any]] = []

    def add(self, listener: Callable[..., Any]) -> None:
        """Have somebody told."""
        self._all.append(listener)

    def tell(self, *what: Any) -> None:
        """Tell all of them."""
        for listener in self._all:
            listener(*what)


#: Told of claims that are not kept where their messages were: a list of `Thrown`.
thrown = Listeners()
#: Told of a message that nobody can read, and was kept: its `Letter` and what is `Buried`.
set_apart = Listeners()
