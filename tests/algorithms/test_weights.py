"""Every reduction against the mean it stands for, and the same weights for any spread of groups over ranks."""

from __future__ import annotations

import numpy as np
import pytest

from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.types import UserError


def identity(vector: np.ndarray) -> np.ndarray:
    return vector


def make_rows(seed: int = 0):
    """Masks, groups and episodes: episodes of 1 to 3 rows, some without a trained token, one whole group so."""
    rng = np.random.default_rng(seed)
    masks, group, episode = [], [], []
    for g in range(6):
        for e in range(int(rng.integers(1, 4))):
            for _ in range(int(rng.integers(1, 4))):
                mask = rng.random(int(rng.integers(1, 7))) < 0.6
                masks.append(mask & (g != 3) & (e != 2))
                group.append(g)
                episode.append(e)
    return masks, np.array(group), np.array(episode)


def slow_mean(name: str, loss, masks, group, episode, constant: float) -> float:
    """The reduction as a formula says it: nested means over lists of numbers."""
    tokens: dict = {}
    for d, mask in enumerate(masks):
        key = {"token_mean": 0, "prompt_mean": int(group[d])}.get(name, (int(group[d]), int(episode[d])))
        tokens.setdefault(key, []).extend(float(loss[d][t]) for t in range(len(mask)) if mask[t])
    if name == "constant":
        return sum(sum(x) for x in tokens.values()) / (len(tokens) * constant)
    means = {key: (sum(x) if name == "sequence_sum" else sum(x) / len(x)) for key, x in tokens.items() if x}
    if name == "prompt_sequence_mean":
        prompts = {key[0]: [m for other, m in means.items() if other[0] == key[0]] for key in means}
        return sum(sum(x) / len(x) for x in prompts.values()) / len(prompts)
    return sum(means.values()) / len(means)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", REDUCTIONS.names())
def test_the_weighted_sum_is_the_mean_asked_for(name: str, seed: int) -> None:
    masks, group, episode = make_rows(seed)
    loss = [np.random.default_rng(seed + 1).normal(size=len(m)) for m in masks]
    weights = REDUCTIONS.get(name)(masks, group, episode, identity, constant=16.0)
    got = sum(float((w * x).sum()) for w, x in zip(weights, loss, strict=True))
    assert got == pytest.approx(slow_mean(name, loss, masks, group, episode, 16.0), rel=1e-12)
    for weight, mask in zip(weights, masks, strict=True):
        assert weight.dtype == np.float64 and len(weight) == len(mask)
        assert ((weight > 0) == mask).all()


@pytest.mark.parametrize("name", REDUCTIONS.names())
def test_ranks_do_not_matter_and_call_all_sum_once(name: str, over_ranks) -> None:
    masks, group, episode = make_rows(2)
    whole = REDUCTIONS.get(name)(masks, group, episode, identity, constant=16.0)
    for owners in ([0] * 6, [0, 1, 0, 1, 1, 0], [2, 2, 0, 0, 2, 0], [0, 1, 2, 2, 1, 0]):
        num_ranks = max(owners) + 1
        keep = [[d for d in range(len(masks)) if owners[group[d]] == rank] for rank in range(num_ranks)]

        def work(rank, all_reduce_sum, keep=keep):
            mine = keep[rank]
            return REDUCTIONS.get(name)(
                [masks[d] for d in mine], group[mine], episode[mine], all_reduce_sum, constant=16.0
            )

        results, calls = over_ranks(num_ranks, work)
        assert calls == [1] * num_ranks
        for rank in range(num_ranks):
            for i, d in enumerate(keep[rank]):
                np.testing.assert_array_equal(results[rank][i], whole[d])  # counts are exact, so weights are


@pytest.mark.parametrize("name", REDUCTIONS.names())
def test_nothing_trained_gives_zero_weights_and_no_rows_give_none(name: str) -> None:
    reduce = REDUCTIONS.get(name)
    with np.errstate(all="raise"):
        (weights,) = reduce([np.zeros(3, dtype=bool)], np.array([0]), np.array([0]), identity, constant=4.0)
    assert weights.tolist() == [0.0, 0.0, 0.0]
    assert reduce([], np.zeros(0, int), np.zeros(0, int), identity, constant=4.0) == []


def test_one_token_weighs_one() -> None:
    mask = [np.array([False, True])]
    for name in ("token_mean", "sequence_mean", "prompt_mean"):
        (weights,) = REDUCTIONS.get(name)(mask, np.array([0]), np.array([0]), identity, constant=0.0)
        assert weights.tolist() == [0.0, 1.0]


def test_an_episode_counts_once_however_many_rows_it_has() -> None:
    masks = [np.ones(2, bool), np.ones(6, bool), np.ones(4, bool)]
    args = (masks, np.array([0, 0, 0]), np.array([0, 0, 1]), identity)
    got = [w[0] for w in REDUCTIONS.get("sequence_mean")(*args, constant=0.0)]
    np.testing.assert_allclose(got, [1 / 16, 1 / 16, 1 / 8])
    got = [w[0] for w in REDUCTIONS.get("constant")(*args, constant=10.0)]
    np.testing.assert_allclose(got, [1 / 20] * 3)


def test_constant_needs_a_divisor() -> None:
    with pytest.raises(UserError, match="above 0"):
        REDUCTIONS.get("constant")([], np.zeros(0, int), np.zeros(0, int), identity, constant=0.0)
