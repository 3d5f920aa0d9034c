"""The tables of the configuration page, in Markdown, made from the code that they describe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from celery import Celery

from reliable_tasks._setup import rules
from reliable_tasks._setup.facts import Facts
from reliable_tasks._setup.visibility import VisibilityTimeout
from reliable_tasks.config import PREFIX, ReliableConfig

__all__ = ["check_table", "rule_table", "settings"]


def settings() -> list[str]:
    """Return the table of the ``reliable_*`` settings, in Markdown."""
    rows = []
    for setting in fields(ReliableConfig):
        default = f"`{setting.default!r}`"
        if setting.metadata["unit"] and setting.default is not None:
            default += f" {setting.metadata['unit']}"
        rows.append((f"`{PREFIX}{setting.name}`", default, setting.metadata["doc"]))
    return _table(("setting", "default", "meaning"), rows)


def rule_table() -> list[str]:
    """Return the table of what ``apply_reliable_config`` sets, in Markdown."""
    rows: dict[str, list[str]] = {}
    for name, broker, backend in (
        ("Redis", "redis://", "redis://"),
        ("RabbitMQ", "amqp://", "redis://"),
    ):
        facts = Facts.of(Celery(broker=broker, backend=backend, set_as_current=False))
        timeout = VisibilityTimeout(0, ("computed, see below",))
        chosen = [(rule, rule.setting) for rule in rules.SETTINGS if rule.applies(facts)]
        chosen += [
            (rule, f"broker_transport_options.{rule.setting}")
            for rule in rules.transport_options(facts, timeout)
        ]
        for rule, setting in chosen:
            value = "computed" if rule.setting == "visibility_timeout" else f"`{rule.value!r}`"
            rows.setdefault(setting, [f"`{setting}`", value, "", rule.reason])[2] += f"{name}, "
    return _table(
        ("setting", "value", "broker", "why"),
        [
            (setting, value, "any" if "Redis, R" in where else where.rstrip(", "), reason)
            for setting, value, where, reason in rows.values()
        ],
    )


def check_table() -> list[str]:
    """Return the table of what ``apply_reliable_config`` warns about, in Markdown."""
    rows = [(f"`{setting}`", reason) for setting, _, reason in rules.CHECKS]
    return _table(("your setting", "what it breaks, and what to do"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
