"""A condition on a metric, as people type it: "eval/accuracy >= 0.9". Of eval.stop_when and `skyrl-tx gate`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*({_NUMBER})\s*")


def read_condition(text: str) -> tuple[str, str, float] | None:
    """(metric, one of RELATIONS, a finite number); None for a text that is no condition."""
    found = _CONDITION.fullmatch(text)
    return (found[1], found[2], float(found[3])) if found and abs(float(found[3])) < math.inf else None
