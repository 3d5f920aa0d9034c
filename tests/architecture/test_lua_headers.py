"""Every script states its contract, and keeps to what it states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import reliable_tasks
from reliable_tasks._store.scripts import load

LUA = Path(reliable_tasks.__file__).parent / "_store" / "lua"
SCRIPTS = sorted(LUA.glob("*.lua"))
SHARED = sorted((LUA / "shared").glob("*.lua"))

_SECTION = re.compile(
    r"-- (Purpose:|KEYS\[\d+(?:\.\.)?\]|ARGV\[\d+(?:\.\.)?\]|Returns:|Uses:|Defines:|Commands:)"
    r"\s+(\S.*)"
)
_ORDER = ["Purpose:", "KEYS", "ARGV", "Returns:", "Uses:", "Commands:"]
_DURATIONS = re.compile(r"\b(ttl|lease|delay|timeout|interval|window|age|gap|elapsed)\b")
_UNIT = re.compile(r"\b(s|ms|us)\b")
_CALL = re.compile(r"redis\.p?call\(\s*'(\w+)'")
_ROW = re.compile(r"^\| `([\w/]+)` \| [a-z].+ \| ([A-Z ]+) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A script, split into its contract and its code."""

    name: str
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
        return cls(path.stem, sections, "\n".join(lines[end:]))

    def named(self, prefix: str) -> dict[str, str]:
        """The sections whose name begins with a prefix."""
        return {name: text for name, text in self.sections if name.startswith(prefix)}

    @property
    def kinds(self) -> list[str]:
        """What its sections are about, in their order, each once in a row."""
        kinds = [name.partition("[")[0] for name, _ in self.sections]
        return [kind for i, kind in enumerate(kinds) if kinds[:i][-1:] != [kind]]

    @property
    def uses(self) -> list[str]:
        """The shared functions that it says it uses."""
        return self.named("Uses:").get("Uses:", "").split()

    @property
    def defines(self) -> str:
        """The function that it says it defines."""
        return self.named("Defines:")["Defines:"].partition("(")[0]

    @property
    def listed(self) -> set[str]:
        """The commands that it says it calls itself."""
        text = self.named("Commands:")["Commands:"]
        names = text.split()
        assert len(names) == len(set(names)), text
        return set() if text == "none" else set(names)

    @property
    def called(self) -> set[str]:
        """The commands that it calls itself."""
        return {command.upper() for command in _CALL.findall(self.code)}

    @property
    def needed(self) -> set[str]:
        """The commands that whoever runs it needs the right to."""
        return self.listed.union(*(FUNCTIONS[name].listed for name in self.uses))


FUNCTIONS = {path.stem: Script.read(path) for path in SHARED}


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest) -> Script:
    """Each script of the library in turn."""
    return Script.read(request.param)


@pytest.fixture(params=SHARED, ids=lambda path: path.stem)
def function(request: pytest.FixtureRequest) -> Script:
    """Each shared function in turn."""
    return Script.read(request.param)


def test_there_are_scripts() -> None:
    """The tests below look where the scripts are."""
    assert SCRIPTS
    assert SHARED


def test_a_header_has_every_section_in_order(script: Script) -> None:
    """Purpose, keys, arguments, answers, functions and commands stand one after the other."""
    assert script.kinds == [kind for kind in _ORDER if kind != "Uses:" or script.uses]


@pytest.mark.parametrize("table", ["KEYS", "ARGV"])
def test_a_header_names_what_the_code_uses(script: Script, table: str) -> None:
    """Keys and arguments are numbered from one, all are used, and none is a secret."""
    named = list(script.named(table))
    has_rest = named[-1].endswith("..]")
    numbered = named[:-1] if has_rest else named
    assert numbered == [f"{table}[{number}]" for number in range(1, len(numbered) + 1)]
    if has_rest:
        assert named[-1] == f"{table}[{len(named)}..]"
    assert set(re.findall(rf"\b{table}\[\d+\]", script.code)) == set(numbered)
    computed = re.findall(rf"\b{table}\[(?!\d+\])", script.code)
    assert bool(computed) is has_rest, "what is counted is the rest, and the rest is counted"


def test_a_duration_has_a_unit(script: Script) -> None:
    """An argument that is a time says in what it is measured."""
    for name, text in script.named("ARGV").items():
        label = re.split(r"[:,\n]", text)[0]
        if _DURATIONS.search(label) and "prefix" not in label:
            assert _UNIT.search(text), f"{name} {text}"


def test_a_header_lists_the_commands_that_are_called(script: Script) -> None:
    """Those who grant rights to the library's user can trust the list."""
    assert script.listed == script.called
    assert script.listed or script.uses, "a script that calls nothing does nothing"


def test_a_header_lists_the_functions_that_are_called(script: Script) -> None:
    """Whatever of the shared functions is called is loaded, and nothing else."""
    called = {name for name in FUNCTIONS if re.search(rf"\b{name}\(", script.code)}
    assert set(script.uses) == called
    assert len(script.uses) == len(set(script.uses))


def test_a_script_is_loaded_behind_its_functions(script: Script) -> None:
    """What the server is given is whole."""
    source = load(script.name).source
    for name in script.uses:
        assert source.index(f"local function {name}(") < source.index(script.code)
    assert source.endswith(f"{script.code}\n")


def test_a_shared_function_states_its_contract(function: Script) -> None:
    """Its file has its name, and it needs no other: what is loaded has only what is listed."""
    assert function.kinds == ["Purpose:", "Defines:", "Commands:"]
    assert function.defines == function.name
    defined = re.findall(r"^local function (\w+\([^)]*\))", function.code, re.MULTILINE)
    assert defined == [re.split(r"(?<=\))", function.named("Defines:")["Defines:"])[0]]
    assert function.listed == function.called
    assert not re.search(r"\b(KEYS|ARGV)\[", function.code)
    others = set(FUNCTIONS) - {function.name}
    assert [name for name in others if re.search(rf"\b{name}\(", function.code)] == []


def test_every_shared_function_is_used() -> None:
    """Nothing lies about."""
    used = {name for path in SCRIPTS for name in Script.read(path).uses}
    assert used == set(FUNCTIONS)


def test_the_readme_lists_every_script_and_all_its_commands() -> None:
    """There a reader finds the rights that each needs, shared functions included."""
    rows = _ROW.findall((LUA / "README.md").read_text())
    expected = {path.stem: Script.read(path).needed for path in SCRIPTS}
    assert {name: set(commands.split()) for name, commands in rows} == expected
    assert [name for name, _ in rows] == sorted(expected)


#: What they write is new, and a full server may refuse it: nothing is lost by that.
_PUBLISHES = {"claim_acquire", "message_publish"}
#: Writes that a full server never refuses; after one it refuses nothing of the script.
_FREES = {"DEL", "HDEL", "ZREM", "ZREMRANGEBYSCORE", "RPOP", "LTRIM", "PEXPIRE"}
_WRITES = _FREES | {"HSET", "HINCRBY", "SET", "ZADD", "RPUSH", "LPUSH"}


def test_a_full_server_refuses_nothing_to_a_task_that_is_queued(script: Script) -> None:
    """Before its first write that takes memory a script frees some, or says that it must go on."""
    if script.name in _PUBLISHES:
        return
    pattern = "|".join([_CALL.pattern, *(rf"\b({name})\(" for name in script.uses)])
    for found in re.finditer(pattern, script.code):
        name = next(one for one in found.groups() if one)
        called = {name.upper()} if name not in FUNCTIONS else FUNCTIONS[name].listed & _WRITES
        if called & _WRITES:
            assert called <= _FREES, f"{name} comes before admit_writes"
            return
