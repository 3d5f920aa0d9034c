"""Every block of the README and the docs is what it says it is."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import pkgutil
import re
import shlex
import sys
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import pytest
import redis
from celery import _state
from celery.app.log import Logging
from celery.bin.celery import celery as celery_command
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging
from click.testing import CliRunner

from reliable_tasks import ReliableWarning
from reliable_tasks._broker.held import all_held
from reliable_tasks._store.client import forget_clients
from tests.docs.alike import matches, with_ids_of_now
from tests.docs.fences import ROOT, Fence, fences_of, pages

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
_NOTES = re.compile(r"worker|warns|raises|output( alike|: .+)?")

#: Languages that are not run here, and why.
_NOT_RUN = {
    "{checks}": "made from the code by docs/_ext",
    "{eval-rst}": "made by Sphinx, which `make docs` runs with warnings as errors",
    "{include}": "made by Sphinx",
    "{rules}": "made from the code by docs/_ext",
    "{settings}": "made from the code by docs/_ext",
    "{toctree}": "made by Sphinx",
}


@pytest.fixture
def celery_as_new() -> Iterator[None]:
    """Give Celery's process-wide state back as it was: current app, shared tasks, logging."""
    before = _state.default_app, _state._tls.current_app
    finalizers, apps = set(_state._on_app_finalizers), set(_state._apps)
    # Where somebody else sets logging up, a worker leaves it alone.
    setup_logging.connect(_leave_logging_alone)
    was_set_up = Logging._setup
    yield
    Logging._setup = was_set_up
    setup_logging.disconnect(_leave_logging_alone)
    _state.default_app, _state._tls.current_app = before
    _state._on_app_finalizers.intersection_update(finalizers)
    for app in set(_state._apps) - apps:
        # A shared task would be made in it too.
        _state._deregister_app(app)
    forget_clients()


def _leave_logging_alone(**_: Any) -> None:
    """Stand in for a user's own way of setting logging up."""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module that a page's code stands in: a user's ``tasks.py``."""
    module = types.ModuleType("tasks")
    monkeypatch.setitem(sys.modules, "tasks", module)
    yield module
    # A result unsubscribes when it goes: while its server is there.
    module.__dict__.clear()
    gc.collect()


@pytest.mark.usefixtures("celery_as_new")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path, module: types.ModuleType, redis_url: str, redis_client: redis.Redis
) -> None:
    """The blocks of a page run in order, as one program, and print what it says they print."""
    printed = ""
    ids: dict[str, str] = {}
    for fence in fences_of(page):
        code = fence.code.replace("redis://localhost:6379/", redis_url[:-1])
        where = f"{page.relative_to(ROOT)}:{fence.line}"
        assert _NOTES.fullmatch(fence.note or "worker"), f"{where}: unknown note {fence.note!r}"
        if fence.language == "python":
            printed = _run(code, fence, module, page)
        elif fence.language == "text":
            assert fence.note.startswith("output"), f"{where}: say what prints this"
            if statement := fence.note.partition(": ")[2]:
                printed = _run(statement, fence, module, page)
            is_alike = fence.note == "output alike"
            is_said = matches(printed, code, ids) if is_alike else _matches(printed, code)
            assert is_said, f"{where}: printed was\n{printed}"
        elif fence.language == "console":
            for command in _commands(fence):
                asked = with_ids_of_now(command, ids) if ids else command
                printed = _check_command(asked, where, redis_client, vars(module).get("app"))
        else:
            assert fence.language.split()[0] in _NOT_RUN, f"{where}: {fence.language!r} is not run"


def test_a_block_that_is_wrong_is_noticed(module: types.ModuleType, tmp_path: Path) -> None:
    """An example that raises, or prints something else, fails this suite at its own line."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    (fence,) = fences_of(page)
    with pytest.raises(AssertionError) as caught:
        _run(fence.code, fence, module, page)
    assert caught.traceback[-1].lineno + 1 == 5
    assert not _matches("one\ntwo\n", "one\n")
    assert not _matches("one\ntwo\n", "...\nthree\n")
    assert _matches("one\ntwo\nthree\n", "one\n...\nthree\n")


def test_an_output_of_another_day_is_held_to_what_does_not_differ() -> None:
    """Ids and times may be others, in the same places; what stands around them may not."""
    id_, other, now, then = (str(uuid4()) for _ in range(4))
    shown = f"id  age\n{id_}  4m 12s\n{other}  2h\n"
    ids: dict[str, str] = {}
    assert matches(f"id    age\n{now}  0s\n{then}  1s\n", shown, ids)
    assert ids == {id_: now, other: then}
    assert with_ids_of_now(f"show {other} {id_}", ids) == f"show {then} {now}"
    # From now on that one is meant.
    assert matches(f"{then} is gone\n", f"{other} is gone\n", ids)
    assert not matches(f"{now} is gone\n", f"{other} is gone\n", ids)
    assert not matches(f"id  age\n{now}  0s\n", shown, {})
    assert not matches(f"{now} {then}\n", f"{id_} {id_}\n", {})
    assert not matches("id  age\nnone  0s\nnone  1s\n", shown, {})
    assert not matches(f"{now}  5 x\n", f"{id_}  5s\n", {})
    assert not matches(f"{now} is here\n", f"{id_} is gone\n", {})
    assert matches("at 2026-03-01 03:12:44+01:00\n", "at 2025-12-31 00:00:00-08:00\n", {})
    assert not matches("at noon\n", "at 2025-12-31 00:00:00-08:00\n", {})


@pytest.mark.parametrize(
    "command",
    [
        "make nonsense",
        "pip install reliable_task",
        "pip install 'reliable-tasks[nonsense]'",
        "celery -A tasks worker --nonsense",
        "celery -A tasks reliable nonsense",
        "nonsense",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    """A page cannot name a make target, an extra or an option that does not exist."""
    with pytest.raises((AssertionError, click.ClickException)):
        _check_command(command, "page", redis.Redis())


def test_every_page_is_in_the_table_of_contents() -> None:
    """A page that nobody can reach from the start page is not documentation."""
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = re.search(r"```{toctree}\n(.*?)```", index, re.DOTALL)
    assert listed is not None
    names = [line for line in listed[1].splitlines() if line and not line.startswith(":")]
    assert sorted(names) == sorted(
        page.stem for page in pages() if page.stem not in ("README", "index")
    )


def test_links_between_pages_lead_somewhere() -> None:
    """A relative link in the README or the docs names a file that exists."""
    for page in pages():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _run(code: str, fence: Fence, module: types.ModuleType, page: Path) -> str:
    """Run a block, and return what it printed."""
    # Empty lines in front, so that a traceback names the line of the page.
    tree = ast.parse("\n" * (fence.line - 1) + code, str(page))
    printed = io.StringIO()
    with contextlib.ExitStack() as around:
        around.enter_context(contextlib.redirect_stdout(printed))
        if fence.note == "worker":
            app = module.__dict__["app"]
            around.enter_context(start_worker(app, pool="solo", perform_ping_check=False))
        elif fence.note == "warns":
            around.enter_context(pytest.warns(ReliableWarning))
        elif fence.note == "raises":
            caught = around.enter_context(pytest.raises(Exception))
        for statement in tree.body:
            one = compile(ast.Module([statement], []), str(page), "exec")
            exec(one, module.__dict__)  # noqa: S102 - our own pages
            if fence.note == "worker":
                _let_acknowledge()
    if fence.note == "raises":
        return f"{caught.type.__name__}: {caught.value}\n"
    return printed.getvalue()


def _let_acknowledge() -> None:
    """Wait a second at most until the worker has acknowledged what it ran.

    Its loop does so a moment after the result is there, and in any order; dead letters have theirs
    by that.
    """
    until = time.monotonic() + 1
    while any(len(held) for held in all_held()) and time.monotonic() < until:
        time.sleep(0.005)


def _matches(printed: str, expected: str) -> bool:
    """Compare, where a line of three dots stands for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()) + r"[ ]*\n"
        for line in expected.splitlines()
    )
    return re.fullmatch(pattern, printed) is not None


def _commands(fence: Fence) -> Iterator[str]:
    for line in fence.code.splitlines():
        assert line.startswith("$ "), f"{line!r} is no command: write '$ ' before it"
        yield line.removeprefix("$ ")


def _check_command(command: str, where: str, client: redis.Redis, app: Any = None) -> str:
    """Check that a command exists, as far as that can be known without running it.

    Those that are asked of Redis, and of ``celery reliable``, are run.
    """
    name, *arguments = shlex.split(command, comments=True)
    checks: dict[str, Callable[[], Any]] = {
        "make": lambda: _check_make(arguments),
        "pip": lambda: _check_pip(arguments),
        "celery": lambda: _check_celery(app, arguments),
        "redis-cli": lambda: _ask_redis(client, arguments),
        "reliable-tasks": lambda: _check_script("reliable-tasks", arguments),
    }
    assert name in checks, f"{where}: nothing here can check {name!r}"
    return str(checks[name]() or "")


def _check_make(arguments: list[str]) -> None:
    target = arguments[0]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target!r}"
    for argument in arguments[1:]:
        variable = argument.partition("=")[0]
        assert re.search(rf"^{variable} *\?=", makefile, re.MULTILINE), f"no variable {variable!r}"


def _check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for requirement in arguments[1:]:
        name, _, extras = requirement.rstrip("]").partition("[")
        assert name == _PROJECT["name"]
        known = _PROJECT["optional-dependencies"]
        assert all(extra in known for extra in extras.split(",") if extra)


def _check_celery(app: Any, arguments: list[str]) -> str | None:
    if arguments[2:3] != ["reliable"]:
        _check_click(celery_command, arguments)
        return None
    # Read from the project, for its metadata is there only where it is installed.
    group = pkgutil.resolve_name(_PROJECT["entry-points"]["celery.commands"]["reliable"])
    context = types.SimpleNamespace(app=app)
    result = CliRunner().invoke(group, arguments[3:], obj=context, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _check_click(command: click.Command, arguments: list[str]) -> None:
    while isinstance(command, click.Group):
        # Only parsed: an app that does not exist is not loaded.
        options = []
        while arguments and arguments[0].startswith("-"):
            options += arguments[:2]
            arguments = arguments[2:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert all(option in known for option in options[::2])
        subcommand = command.commands.get(arguments[0])
        assert subcommand is not None, f"no command {arguments[0]!r}"
        command, arguments = subcommand, arguments[1:]
    known = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for argument in arguments:
        if argument.startswith("-"):
            assert argument.partition("=")[0] in known, f"{command.name} has no option {argument!r}"


def _check_script(script: str, arguments: list[str]) -> None:
    # Read from the project, for its metadata is there only where it is installed.
    _check_click(pkgutil.resolve_name(_PROJECT["scripts"][script]), arguments)


def _ask_redis(client: redis.Redis, arguments: list[str]) -> str:
    if arguments[:2] == ["--scan", "--pattern"]:
        found: Any = sorted(client.scan_iter(match=arguments[2]))
    else:
        found = client.execute_command(*arguments)
    return "".join(f"{line}\n" for line in (found if isinstance(found, list) else [found]))
