"""What the docs say of names and defaults is what the code has."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from datetime import timedelta
from types import ModuleType

import pytest
import tenacity

import reliable_tasks
from reliable_tasks import ReliableConfig, presets
from reliable_tasks._setup import rules
from reliable_tasks._setup.concerns import CHECKS
from tests.docs.fences import ROOT

_HEAD = "| setting | default | meaning |"
_SPAN = re.compile(r"(?:(\d+) h)? ?(?:(\d+) min)? ?(?:(\d+) s)?")
_RETRIES = re.compile(r"(\d+) attempts, (.+) doubling up to (.+)")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The module that makes the pages' tables."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "_ext" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_table_has_every_setting_and_its_default(tables: ModuleType) -> None:
    """A row of the page is a field of `ReliableConfig`, with its default."""
    head, _, *rows = tables.settings()
    assert head == _HEAD
    assert len(rows) == len(fields(ReliableConfig))
    for setting, row in zip(fields(ReliableConfig), rows, strict=True):
        assert row.startswith(
            f"| `reliable_{setting.name}` | `{getattr(ReliableConfig(), setting.name)!r}`"
        )
        assert setting.metadata["doc"] in row


def test_the_rules_table_has_every_rule(tables: ModuleType) -> None:
    """What `apply_reliable_config` sets stands in the page, with its value and its reason."""
    page = "\n".join(tables.rule_table())
    for rule in rules.SETTINGS:
        assert f"| `{rule.setting}` | `{rule.value!r}` |" in page
        assert rule.reason in page
    for setting in ("visibility_timeout", "unacked_restore_interval", "confirm_publish"):
        assert f"`broker_transport_options.{setting}`" in page


def test_the_checks_table_has_every_check(tables: ModuleType) -> None:
    """What `apply_reliable_config` warns about stands in the page."""
    assert len(tables.check_table()) == 2 + len(CHECKS)


@pytest.mark.parametrize("name", ["QUICK", "STANDARD", "LONG", "BATCH"])
def test_the_presets_table_is_what_the_presets_are(name: str) -> None:
    """The table in the docstring, which the page shows, has each preset's numbers."""
    assert presets.__doc__ is not None
    (row,) = re.findall(rf"^``{name}``  +(.+)$", presets.__doc__, re.MULTILINE)
    soft, hard, retries, expires = re.split(r"  +", row.strip())
    preset = getattr(presets, name)
    assert preset["soft_time_limit"] == _seconds(soft)
    assert preset["time_limit"] == _seconds(hard)
    assert preset.get("expires") == (None if expires == "never" else _seconds(expires))
    said = _RETRIES.fullmatch(retries)
    assert said is not None
    stop, wait = preset["retrying"].stop, preset["retrying"].wait
    assert isinstance(stop, tenacity.stop_after_attempt)
    assert isinstance(wait, tenacity.wait_random_exponential)
    assert stop.max_attempt_number == int(said[1])
    assert (wait.multiplier, wait.exp_base) == (_seconds(said[2]), 2)
    assert wait.max == _seconds(said[3])


def test_the_api_page_has_every_public_name() -> None:
    """What can be imported from the package is documented."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    documented = set(re.findall(r"auto\w+:: reliable_tasks\.(\w+)$", page, re.MULTILINE))
    assert documented - {"errors"} == set(reliable_tasks.__all__) - {"presets"}


def _seconds(text: str) -> int:
    match = _SPAN.fullmatch(text)
    assert match is not None, f"{text!r} is no time"
    hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return int(timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds())
