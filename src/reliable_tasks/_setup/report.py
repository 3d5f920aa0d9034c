"""What ``apply_reliable_config`` did, to print and to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Change", "Concern", "Report"]


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that was left open and is set now.

    Attributes:
        setting: Its name; ``broker_transport_options.visibility_timeout`` for one inside another.
        old: What Celery would have used.
        new: What is used now.
        reason: Why.
    """

    setting: str
    old: Any
    new: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Concern:
    """A setting of the user's own that stays, and what it breaks.

    Attributes:
        setting: Its name.
        value: The user's value.
        reason: What is no longer promised, and what would mend it.
    """

    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}: {self.reason}"


class Report:
    """The changes and concerns of one app.

    The configuration of an app is read late, so the report is made when somebody looks at it:
    looking reads the configuration.
    """

    def __init__(self, read: Callable[[], tuple[list[Change], list[Concern]]]) -> None:
        self._read = read

    @property
    def changes(self) -> list[Change]:
        """What was set, and why."""
        return self._read()[0]

    @property
    def concerns(self) -> list[Concern]:
        """What the user set that breaks the promise."""
        return self._read()[1]

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return the report as plain data."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "concerns": [asdict(concern) for concern in self.concerns],
        }

    def __getitem__(self, setting: str) -> Change:
        """Return the change of one setting.

        Raises:
            KeyError: It was not changed.
        """
        for change in self.changes:
            if change.setting == setting:
                return change
        raise KeyError(setting)

    def __str__(self) -> str:
        lines = ["reliable_tasks set:"]
        for change in self.changes:
            lines.append(f"  {change.setting} = {change.new!r} (was {change.old!r})")
            lines.append(f"      {change.reason}")
        if self.concerns:
            lines.append("your settings that break the promise:")
        for concern in self.concerns:
            lines.append(f"  {concern.setting} = {concern.value!r}")
            lines.append(f"      {concern.reason}")
        return "\n".join(lines)
