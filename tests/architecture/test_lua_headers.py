"""Every script states its contract, and keeps to what it states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import reliable_tasks

LUA = Path(reliable_tasks.__file__).parent / "_store" / "lua"
SCRIPTS = sorted(LUA.glob("*.lua"))

_SECTION = re.compile(r"-- (Purpose:|KEYS\[\d+\]|ARGV\[\d+\]|Returns:|Commands:)\s+(\S.*)")
_ORDER = ["Purpose:", "KEYS", "ARGV", "Returns:", "Commands:"]
_DURATIONS = re.compile(r"(ttl|lease|delay|timeout|interval|window|age)\b")
_UNIT = re.compile(r"\b(s|ms|us)\b")
_CALL = re.compile(r"redis\.p?call\(\s*'(\w+)'")


@dataclass(frozen=True)
class Script:
    """A script, split into its contract and its code."""

    sections: list[tuple[str, str]]
    code: str

    @classmethod
    def read(cls, path: Path) -> Script:
        """Split a file where its leading comment ends, and the comment into sections."""
        lines = path.read_text().splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("--"))
        sections: list[tuple[str, str]] = []
        for line in lines[:end]:
            if found := _SECTION.match(line):
                sections.append((found[1], found[2]))
            else:
                name, text = sections.pop()
                sections.append((name, f"{text}\n{line.removeprefix('--').strip()}"))
        return cls(sections, "\n".join(lines[end:]))

    def named(self, prefix: str) -> dict[str, str]:
        """The sections whose name begins with a prefix."""
        return {name: text for name, text in self.sections if name.startswith(prefix)}


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest) -> Script:
    """Each script of the library in turn."""
    return Script.read(request.param)


def test_there_are_scripts() -> None:
    """The tests below look where the scripts are."""
    assert SCRIPTS


def test_a_header_has_every_section_in_order(script: Script) -> None:
    """Purpose, keys, arguments, answers and commands are all there, one after the other."""
    kinds = [name.partition("[")[0] for name, _ in script.sections]
    assert [kind for i, kind in enumerate(kinds) if kinds[:i][-1:] != [kind]] == _ORDER


@pytest.mark.parametrize("table", ["KEYS", "ARGV"])
def test_a_header_names_what_the_code_uses(script: Script, table: str) -> None:
    """Keys and arguments are numbered from one, all are used, and none is a secret."""
    named = list(script.named(table))
    assert named == [f"{table}[{number}]" for number in range(1, len(named) + 1)]
    assert set(re.findall(rf"\b{table}\[\d+\]", script.code)) == set(named)


def test_a_duration_has_a_unit(script: Script) -> None:
    """An argument that is a time says in what it is measured."""
    for name, text in script.named("ARGV").items():
        if _DURATIONS.match(text):
            assert _UNIT.search(text), f"{name} {text}"


def test_a_header_lists_the_commands_that_are_called(script: Script) -> None:
    """Those who grant rights to the library's user can trust the list."""
    listed = script.named("Commands:")["Commands:"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {command.upper() for command in _CALL.findall(script.code)}
