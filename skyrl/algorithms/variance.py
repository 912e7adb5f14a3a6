"""When numbers that should be equal differ by rounding alone: the one rule of groups, of filters and of whitening.

A reward is a decimal number that float64 rounds, and a score is a sum of rewards: 10.1 + 0.2 and 10.3 differ in their
last bit. Divided by their standard deviation, such scores would become advantages of full size, made of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

ULPS = 16
"""Units in the last place by which equal scores may differ: of each reward one for being written down, a few for what
an environment computes before it returns it."""
_SMALLEST = 1e-150  # a spread below it has a square of 0
_EPS = float(np.finfo(np.float64).eps)


def magnitude(values: np.ndarray) -> np.ndarray:
    """|values| as the `scale` of `is_rounding`, float64. A critic's values are float32, whose last place is 2^29 times
    as large as a float64's: they count as so much larger."""
    values = np.asarray(values)
    eps = float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else _EPS
    return np.abs(values.astype(np.float64)) * (eps / _EPS)


def score_of(rewards: Iterable[float]) -> tuple[float, float]:
    """(sum of an episode's rewards, rounded once; its scale). The scale is the sum of their magnitudes, since what was
    rounded may be much larger than what is left of it: 1e6 - 1e6 + 0.3."""
    rewards = rewards if isinstance(rewards, np.ndarray) else np.array(list(rewards), np.float64)
    given = rewards[rewards != 0]  # most tokens have none
    return math.fsum(given.tolist()), float(magnitude(given).sum())


def is_rounding(spread: float, scale: float) -> bool:
    """Whether a spread (largest minus smallest, or a standard deviation) is no more than a few units in the last place
    of `scale`, the size of the numbers whose sums are compared: then they have no variance."""
    return spread <= max(ULPS * _EPS * scale, _SMALLEST)
