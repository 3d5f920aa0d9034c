"""Every key of the library comes from one place."""

from __future__ import annotations

from reliable_tasks._store.keys import Keys


def test_a_claims_key_carries_a_hash_tag() -> None:
    """All that belongs to a claim lives in one slot of a cluster."""
    assert Keys("g:reliable:").claim("send:7") == "g:reliable:claim:{send:7}"


def test_a_pattern_escapes_the_prefix() -> None:
    """What a glob would read into a prefix is taken literally."""
    assert Keys("a*[b]?:").claims_pattern() == r"a\*\[b\]\?:claim:{*}"
