"""Every supported Python with every supported Celery: ``nox``, or ``nox -s 'tests-3.12(5.6)'``."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.11", "3.12", "3.13"]
CELERIES = ["5.6", "5.7"]


@nox.session(python=PYTHONS)
@nox.parametrize("celery", CELERIES, ids=CELERIES)
def tests(session: nox.Session, celery: str) -> None:
    """Run the test suite; arguments after ``--`` go to pytest."""
    session.install("--editable", ".[test]", f"celery=={celery}.*")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types and import layers."""
    session.install("--editable", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install("--editable", ".[docs]")
    session.run(
        *("python", "-m", "sphinx", "--fail-on-warning", "--keep-going"),
        *("docs", "docs/_build/html"),
    )
