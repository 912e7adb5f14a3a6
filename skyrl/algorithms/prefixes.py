"""Rows that begin alike, as the samples of one prompt do: what they share is computed once.

A causal model gives equal beginnings equal hidden states. So the products with weights, nearly all of the work, see
each different beginning once (U tokens); only attention runs over whole rows (T tokens). A prompt of 100 tokens with 8
answers of 20 is 260 tokens of work and not 960. The head sees each pair of a beginning and a target once (P of them).
Values are those of rows computed apart; gradients differ in the order of their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from skyrl.types import Datum

WORTH = 0.9  # with more than this part of the tokens left to compute, rows are computed apart
ALIKE = 8  # rows of which one part in so many is the beginning of the one before belong together


def shared_prefixes(rows: Sequence[Datum]) -> dict[str, np.ndarray]:
    """Indices for rows packed end to end, or nothing where too little is shared: `distinct_U`, tokens that stand for
    all, `place_T`, the one of each token; `scored_P`, positions whose pairs of beginning and target stand for all,
    `pair_T`, the one of each position. Each row is compared with the one before it."""
    starts = list(accumulate((len(row.tokens) for row in rows), initial=0))
    tokens = [0, *(_alike(a, b) for a, b in pairwise(rows))]
    if sum(tokens) < (1 - WORTH) * starts[-1]:
        return {}
    whole = [_uncut(row) for row in rows]  # what is before the first token whose softmax is over some tokens only
    pairs = [
        0,
        *(
            min(_common(a.targets, b.targets), *both)
            for (a, b), *both in zip(pairwise(rows), tokens[1:], whole, whole[1:], strict=False)
        ),
    ]
    distinct_U, place_T = _indices(starts, tokens)
    scored_P, pair_T = _indices(starts, pairs)
    return {"distinct_U": distinct_U, "place_T": place_T, "scored_P": scored_P, "pair_T": pair_T}


def families(rows: Sequence[Datum], models: Sequence[str], budget: int) -> list[list[int]]:
    """Indices of rows that share one part in ALIKE or more with the row of their model before them, as far as `budget`
    tokens go: to be put into one micro-batch. A model's rows are divided as if there were no others."""
    out: list[list[int]] = []
    latest: dict[str, tuple[int, list[int], int]] = {}  # of each model: its row before, the rows of that, tokens left
    for i, (row, model) in enumerate(zip(rows, models, strict=True)):
        length = len(row.tokens)
        before, unit, room = latest.get(model, (i, [], 0))
        if length > room or ALIKE * _common(rows[before].tokens, row.tokens) < length:
            unit, room = [], budget
            out.append(unit)
        unit.append(i)
        latest[model] = (i, unit, room - length)
    return out


def _alike(a: Datum, b: Datum) -> int:
    """Tokens that two rows begin with alike, and send to the same experts."""
    if a.experts is None or b.experts is None:
        return _common(a.tokens, b.tokens) if a.experts is b.experts else 0
    return min(_common(a.tokens, b.tokens), _common(a.experts, b.experts))


def _uncut(row: Datum) -> int:
    """Tokens before the first one with a support."""
    cut = np.zeros(0, bool) if row.support is None else row.support.counts > 0
    return int(cut.argmax()) if cut.any() else len(row.tokens)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Entries in which two arrays are equal before the first in which they differ."""
    if a.shape[1:] != b.shape[1:]:
        return 0
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]).reshape(length, -1).any(1)
    return int(differ.argmax()) if differ.any() else length


def _indices(starts: list[int], shared: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The entries that stand for all, and for each entry the number of the one that stands for it, where the first
    `shared` of a row are those of the row before."""
    new = np.ones(starts[-1], bool)
    for start, count in zip(starts, shared, strict=False):
        new[start : start + count] = False
    number = np.cumsum(new) - 1
    for before, start, count in zip(starts, starts[1:], shared[1:], strict=False):
        number[start : start + count] = number[before : before + count]
    return np.flatnonzero(new), number
