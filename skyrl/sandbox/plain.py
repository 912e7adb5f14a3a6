"""Plain data as text, one text per value: what crosses the border of a sandbox, and how results are compared.

Two values have the same text exactly when their types and contents are equal all the way down: 1, 1.0 and True differ,
a tuple is no list, the order of a dict or set does not count, NaN equals itself. An answer is compared as text, so no
`__eq__` and no subclass of what is untrusted ever runs outside, and nothing is rebuilt from it (no pickles).
"""

from __future__ import annotations

import json
from typing import Any

_SAFE_INT = 2**53  # larger ones travel as hex: no limit of digits, and no quadratic time


def to_text(value: object, keep_order: bool = False) -> str:
    """The one text of a value made of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict.

    keep_order: dicts stay in the order they have, to be handed on rather than compared. Raises TypeError for anything
    else (a subclass of these too), RecursionError for what contains itself.
    """
    return json.dumps(_encode(value, keep_order), separators=(",", ":"))


def from_text(text: str) -> Any:
    """The value of a text that to_text made. Raises ValueError for any other text, RecursionError when too deep.

    For use inside of a sandbox: keys of a hostile dict can be chosen to collide, which takes quadratic time.
    """
    try:
        return _decode(json.loads(text))
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"no plain data: {error}") from error


def _encode(value: Any, keep_order: bool) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SAFE_INT < value < _SAFE_INT else {"int": hex(value)}
    if kind is float:
        return value + 0.0  # -0.0 equals 0.0
    if kind is list:
        return [_encode(item, keep_order) for item in value]
    if kind is tuple:
        return {"tuple": [_encode(item, keep_order) for item in value]}
    if kind is dict:
        pairs = [[to_text(key), _encode(item, keep_order)] for key, item in value.items()]
        return {"dict": pairs if keep_order else sorted(pairs, key=lambda pair: pair[0])}
    if kind is set or kind is frozenset:
        return {kind.__name__: sorted(to_text(item) for item in value)}
    if kind is bytes:
        return {"bytes": value.decode("latin-1")}
    if kind is complex:
        return {"complex": [value.real + 0.0, value.imag + 0.0]}
    raise TypeError(f"{kind.__name__} is no plain data (numbers, text, bytes, lists, tuples, sets, dicts of these)")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    makers = {
        "int": lambda: int(content, 16),
        "tuple": lambda: tuple(_decode(item) for item in content),
        "dict": lambda: {from_text(key): _decode(item) for key, item in content},
        "set": lambda: {from_text(item) for item in content},
        "frozenset": lambda: frozenset(from_text(item) for item in content),
        "bytes": lambda: content.encode("latin-1"),
        "complex": lambda: complex(*content),
    }
    return makers[kind]()
