"""What the pages take from the code, so that they cannot disagree with it.

- ``{settings}``, ``{rules}`` and ``{checks}`` are tables made from the library itself.
- Names between single backticks in docstrings become links where they are public.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import tables
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import reliable_tasks


def _directive(table: Callable[[], list[str]]) -> type[SphinxDirective]:
    class Table(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            place = nodes.container()
            self.state.nested_parse(
                StringList(table(), source=__file__), self.content_offset, place
            )
            return list(place.children)

    return Table


def link_names(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn what stands between single backticks into a link or a literal."""

    def link(found: re.Match[str]) -> str:
        text = found.group(1)
        public = text.lstrip("@").partition(".")[0]
        if public in reliable_tasks.__all__:
            return f":py:obj:`{text} <reliable_tasks.{text.lstrip('@')}>`"
        return f"``{text}``"

    lines[:] = [re.sub(r"(?<![`:\w])`([^`<]+)`(?![`_])", link, line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and the hook."""
    app.add_directive("settings", _directive(tables.settings))
    app.add_directive("rules", _directive(tables.rule_table))
    app.add_directive("checks", _directive(tables.check_table))
    app.connect("autodoc-process-docstring", link_names, priority=100)
    return {"parallel_read_safe": True, "version": "1"}
