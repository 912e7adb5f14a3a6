"""Filters say what they drop, and their counts add up."""

from __future__ import annotations

import numpy as np
import pytest

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows
from skyrl.algorithms.filters import (
    FILTERS,
    dropped_by,
    filter_metrics,
    overlong_rows,
    register_filter,
    trained_masks,
    zero_variance_groups,
)
from skyrl.types import Episode, Prompt, UserError


def test_zero_variance_groups() -> None:
    groups = [[1.0, 1.0, 1.0], [0.0, 1.0], [0.1, 0.1 + 1e-12], [2.0], [], [0.0, 0.0]]
    assert zero_variance_groups(groups).tolist() == [False, True, True, False, False, False]
    assert zero_variance_groups([]).shape == (0,)
    with pytest.raises(RuntimeError, match="group 1"):
        zero_variance_groups([[1.0, 2.0], [1.0, float("nan")]])


def test_dropped_groups_are_those_whose_centred_advantages_are_zero() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 2, size=3).astype(float).tolist() for _ in range(20)]
    keep = zero_variance_groups(groups)
    assert 0 < keep.sum() < 20
    flat = [score for group in groups for score in group]
    rows = RewardRows(
        np.repeat(np.arange(20), 3),
        np.tile(np.arange(3), 20),
        [np.array([s]) for s in flat],
        [np.ones(1, dtype=bool) for _ in flat],
        np.ones(60, dtype=bool),
    )
    advantages = np.array(ADVANTAGES.get("dr_grpo").compute(rows, lambda x: x, params={}).advantages).reshape(20, 3)
    assert ((advantages != 0).any(axis=1) == keep).all()


def test_trained_masks() -> None:
    masks = [np.array([False, True, True]), np.array([True]), np.array([True, True])]
    stops, valid = ["stop", "length", "aborted"], np.array([True, True, False])
    assert overlong_rows(stops).tolist() == [False, True, False]
    assert [m.tolist() for m in trained_masks(masks, stops, valid, "keep")] == [
        [False, True, True],
        [True],
        [False, False],
    ]
    assert [m.tolist() for m in trained_masks(masks, stops, valid, "mask")] == [
        [False, True, True],
        [False],
        [False, False],
    ]
    assert masks[1].tolist() == [True] and masks[2].tolist() == [True, True]  # the inputs are left alone


def test_counts() -> None:
    keep = np.array([True, False, False])
    got = filter_metrics(keep, ["stop", "length", "length", "aborted"], np.array([True, True, False, True]))
    assert got == {
        "filters/groups:sum": 3.0,
        "filters/zero_variance_groups:sum": 2.0,
        "filters/episodes:sum": 4.0,
        "filters/overlong_episodes:sum": 2.0,
        "filters/invalid_episodes:sum": 1.0,
    }
    assert set(filter_metrics(np.zeros(0, bool), [], np.zeros(0, bool)).values()) == {0.0}


def test_filters_of_ones_own_say_true_or_false() -> None:
    before = dict(FILTERS._things)
    register_filter("some")(lambda episodes: np.bool_(any(e.reward for e in episodes)))
    register_filter("few")(lambda episodes: len(episodes) < 3)
    register_filter("none")(lambda episodes: None)
    register_filter("raises")(lambda episodes: 1 / 0)
    episodes = [Episode(Prompt("p/1", "e", [], {"source": "rows.jsonl:3"}), i, [], 0.0, "stop") for i in range(2)]
    try:
        assert dropped_by([], episodes) == dropped_by(["few"], episodes) == ""
        assert dropped_by(["few", "some"], episodes) == "some"
        with pytest.raises(UserError, match="filters.names: filter none, rows.jsonl:3: returned None, wanted True"):
            dropped_by(["none"], episodes)
        with pytest.raises(UserError, match="filter raises, rows.jsonl:3: raised ZeroDivisionError: division by zero"):
            dropped_by(["raises"], episodes)
        with pytest.raises(
            UserError, match="algorithm.filters.names: no filter called 'sum'; choose one of: .*few, none"
        ):
            dropped_by(["sum"], episodes)
    finally:
        FILTERS._things = before
