"""A canonical, typed encoding of task arguments.

Two values have one encoding only if a worker would see the same value: types are kept
apart (``1``, ``"1"``, ``True``), while lists and tuples, which no serializer but pickle tells
apart, are one. Every piece carries its length, so no two sequences of values run together
(`bencode`_ is the model).

.. _bencode: https://en.wikipedia.org/wiki/Bencode
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any
from uuid import UUID

__all__ = ["digest", "encode"]

_DIGEST_CHARACTERS = 32


def digest(*values: Any) -> str:
    """Return 128 bits of the SHA-256 of the values' encoding, as hexadecimal digits.

    Raises:
        TypeError: A value is of a type that has no encoding.
    """
    pieces = [_name(one) if type(one) is str else encode(one) for one in values]
    return hashlib.sha256(_piece(b"l", b"".join(pieces))).hexdigest()[:_DIGEST_CHARACTERS]


@lru_cache(maxsize=1024)
def _name(text: str) -> bytes:
    # Mostly a task's, or its template: the same in each call.
    return encode(text)


def encode(value: Any) -> bytes:
    """Return the canonical encoding of a value.

    Raises:
        TypeError: It is of a type that has no encoding.
    """
    if isinstance(value, Enum):
        # Serializers send an enum's value, so a worker could not tell the two apart either.
        return encode(value.value)
    if value is None or isinstance(value, bool):
        return _piece(b"b", str(value))
    if isinstance(value, str):
        return _piece(b"s", str(value))
    if isinstance(value, int):
        return _piece(b"i", hex(value))
    if isinstance(value, float):
        return _piece(b"f", repr(float(value)))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _piece(b"y", bytes(value))
    if isinstance(value, (list, tuple)):
        return _piece(b"l", b"".join(map(encode, value)))
    if isinstance(value, Mapping):
        return _piece(b"d", _sorted(encode(k) + encode(v) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return _piece(b"e", _sorted(map(encode, value)))
    if isinstance(value, (datetime, date, time)):
        return _piece(b"t", f"{type(value).__name__}:{value.isoformat()}")
    if isinstance(value, timedelta):
        return _piece(b"p", f"{value.days}:{value.seconds}:{value.microseconds}")
    if isinstance(value, (Decimal, UUID)):
        return _piece(b"n", f"{type(value).__name__}:{value}")
    return _encode_object(value)


def _encode_object(value: Any) -> bytes:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "model_dump") and hasattr(type(value), "model_fields"):  # pydantic
        return _piece(b"o", encode(kind) + encode(value.model_dump()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _piece(b"o", encode(kind) + encode(fields))
    if hasattr(value, "__json__"):  # kombu's own hook for a value's JSON
        return encode(value.__json__())
    raise TypeError(
        f"a {kind} has no stable value to build a @once key from; name the parts that matter: "
        "@once(key='order:{order.id}'), or give a function: @once(key=lambda order: order.id)"
    )


def _piece(kind: bytes, content: str | bytes) -> bytes:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return b"%s%d:%s" % (kind, len(data), data)


def _sorted(pieces: Iterable[bytes]) -> bytes:
    return b"".join(sorted(pieces))
