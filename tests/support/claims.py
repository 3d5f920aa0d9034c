"""Steps of the store that the library takes for many claims at once, for one."""

from __future__ import annotations

from reliable_tasks._store.claims import Claims
from reliable_tasks._store.publication import Publication

__all__ = ["abandon", "confirm"]


def abandon(claims: Claims, name: str, *, owner: str, token: str, in_doubt: bool = False) -> bool:
    """Take a publish back; return whether there was something to take back."""
    (answer,) = claims.abandon_each([(Publication(claim=name, owner=owner), token, in_doubt)])
    return answer


def confirm(claims: Claims, name: str, *, owner: str, attempt: int) -> None:
    """Note that the message of a call is queued."""
    claims.confirm_each([Publication(claim=name, owner=owner, claim_attempt=attempt)])
