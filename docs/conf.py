"""Sphinx configuration. Nothing here needs a network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "reliable_tasks"
author = "The reliable_tasks developers"
copyright = author  # noqa: A001 - Sphinx's name

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "reliable_docs",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]

html_theme = "furo"
html_title = "reliable_tasks"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "__new__, __init__"}
napoleon_numpy_docstring = False

nitpicky = True
# Documented elsewhere; their inventories would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(celery|kombu|tenacity|redis)\..*"),
    (r"py:.*", r"(collections\.abc|datetime|typing|types)\..*"),
    (
        r"py:(class|exc|obj)",
        (
            r"(Any|Callable|Celery|Exception|ImportError|Iterator|KeyError|Literal|Mapping|None|"
            r"Retry|Task|UserWarning|ValueError|bool|dict|float|int|list|object|str|timedelta|"
            r"tuple)"
        ),
    ),
    # Types of private parts that a public signature mentions.
    (r"py:class", r"reliable_tasks\._(asked|once|setup|store)\..*"),
]
