"""Celery's and kombu's private parts have one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import reliable_tasks

PACKAGE = Path(reliable_tasks.__file__).parent
HOME = PACKAGE / "_celery"


def test_only_their_home_imports_private_names_of_celery() -> None:
    """A release of Celery that moves something private can break one package only."""
    found = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.is_relative_to(HOME)
        for name in _imported(ast.parse(path.read_text()))
        if name.split(".")[0] in {"billiard", "celery", "kombu"}
        and any(part.startswith("_") for part in name.split("."))
    ]
    assert found == []


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
