"""Every Redis key that this library writes.

========================================  ====  =================================================
key                                       type  what
========================================  ====  =================================================
``<prefix>claim:{<claim name>}``          hash  who owns a ``@once`` key; see ``lua/README.md``
``<prefix>ended:{<claim name>}``          str   the last attempt of a task that was retried
========================================  ====  =================================================

``<prefix>`` is kombu's ``global_keyprefix`` followed by ``reliable_key_prefix``. The braces are
a Redis Cluster hash tag: all that belongs to one claim lives in one slot.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Keys"]


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds keys behind one prefix."""

    prefix: str

    def claim(self, name: str) -> str:
        """Return the key of the claim called ``name``."""
        return f"{self.prefix}claim:{{{name}}}"

    def ended(self, name: str) -> str:
        """Return the key that remembers the last attempt of the claim's last owner."""
        return f"{self.prefix}ended:{{{name}}}"

    def claims_pattern(self) -> str:
        """Return the ``SCAN`` pattern that finds every claim."""
        escaped = "".join("\\" + c if c in "*?[]\\^" else c for c in self.prefix)
        return f"{escaped}claim:{{*}}"
