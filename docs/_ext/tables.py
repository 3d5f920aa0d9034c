"""The tables of the configuration page, in Markdown, made from the code that they describe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from celery import Celery

from reliable_tasks._setup import rules
from reliable_tasks._setup.concerns import CHECKS
from reliable_tasks._setup.facts import Facts
from reliable_tasks._setup.visibility import VisibilityTimeout
from reliable_tasks.config import PREFIX, ReliableConfig

__all__ = ["check_table", "rule_table", "settings"]

#: Brokers, as they differ in what is set. The last backend is none that could hold leases.
_APPS = (
    ("Redis", "redis://", "redis://", {}),
    ("stock", "redis://", "redis://", {"reliable_broker": "stock"}),
    ("RabbitMQ", "amqp://", "redis://", {}),
    ("alone", "amqp://", "rpc://", {}),
)
#: What a page says for those of them that a setting is for.
_WHERE = {
    frozenset({"Redis", "stock", "RabbitMQ", "alone"}): "anywhere",
    frozenset({"Redis", "stock", "RabbitMQ"}): "results in a Redis",
    frozenset({"Redis", "stock"}): "Redis",
    frozenset({"RabbitMQ", "alone"}): "RabbitMQ",
    frozenset({"Redis"}): "Redis, with leases",
    frozenset({"Redis", "RabbitMQ"}): "with leases",
    frozenset({"stock", "alone"}): "without leases",
    frozenset({"stock"}): "stock",
}


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
    rows: dict[tuple[str, str, str], set[str]] = {}
    for name, broker, backend, conf in _APPS:
        app = Celery(broker=broker, backend=backend, set_as_current=False)
        app.conf.update(conf)
        facts = Facts.of(app)
        timeout = VisibilityTimeout(0, ("computed, see below",))
        chosen = [(rule, rule.setting) for rule in rules.SETTINGS if rule.applies(facts)]
        chosen += [
            (rule, f"broker_transport_options.{rule.setting}")
            for rule in rules.transport_options(facts, timeout)
        ]
        for rule, setting in chosen:
            value = "computed" if rule.setting == "visibility_timeout" else f"`{rule.value!r}`"
            rows.setdefault((setting, value, rule.reason), set()).add(name)
    return _table(
        ("setting", "value", "where", "why"),
        [
            (f"`{setting}`", value, _WHERE[frozenset(names)], reason)
            for (setting, value, reason), names in rows.items()
        ],
    )


def check_table() -> list[str]:
    """Return the table of what ``apply_reliable_config`` warns about, in Markdown."""
    rows = [(f"`{setting}`", reason) for setting, _, reason in CHECKS]
    return _table(("your setting", "what it breaks, and what to do"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
