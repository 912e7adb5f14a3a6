"""Every advantage against a slow loop from its paper, edge cases, and the same numbers for any spread over ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from skyrl.algorithms import advantages
from skyrl.algorithms.advantages import ADVANTAGES, RewardRows, kl_rewards
from skyrl.algorithms.filters import zero_variance_groups
from skyrl.algorithms.variance import score_of
from skyrl.types import UserError


def identity(vector: np.ndarray) -> np.ndarray:
    return vector


def advantages_of(name: str, rows: RewardRows, params: dict[str, float], all_reduce_sum=identity):
    """With those of `params` that this advantage takes."""
    declared = ADVANTAGES.get(name)
    mine = {key: value for key, value in params.items() if key in declared.params}
    return declared.compute(rows, all_reduce_sum, params=mine)


def make_rows(seed: int = 0, num_groups: int = 5, with_values: bool = True) -> RewardRows:
    """Groups of 1 to 4 episodes of 1 to 3 rows, with observed tokens before, between and after, some not valid."""
    rng = np.random.default_rng(seed)
    group, episode, rewards, masks, valid, values = [], [], [], [], [], []
    for g in range(num_groups):
        for e in range([3, 1, 4, 2, 3][g % 5]):
            is_valid = rng.random() > 0.2
            for _ in range(rng.integers(1, 4)):
                length = int(rng.integers(2, 9))
                mask = rng.random(length) < 0.6
                mask[rng.integers(length)] = True
                reward = np.zeros(length)
                reward[np.flatnonzero(mask)[-1]] = rng.normal() if is_valid else np.nan
                group.append(100 + g)
                episode.append(e)
                rewards.append(reward)
                masks.append(mask)
                valid.append(is_valid)
                values.append(np.where(mask, rng.normal(size=length), np.nan))  # never read where nothing was sampled
    return RewardRows(
        np.array(group),
        np.array(episode),
        rewards,
        masks,
        np.array(valid),
        values if with_values else None,
        bootstrap_D=rng.normal(size=len(masks)),
        baseline_D=np.array(group) / 100.0,
        log_ratios=[0.3 * rng.normal(size=len(mask)) for mask in masks],
    )


def take(rows: RewardRows, keep: list[int]) -> RewardRows:
    return RewardRows(
        rows.group_D[keep],
        rows.episode_D[keep],
        [rows.rewards[d] for d in keep],
        [rows.masks[d] for d in keep],
        rows.valid_D[keep],
        None if rows.values is None else [rows.values[d] for d in keep],
        bootstrap_D=rows.bootstrap_D[keep],
        baseline_D=rows.baseline_D[keep],
        log_ratios=[rows.log_ratios[d] for d in keep],
    )


def simple(scores: list[float], groups: list[int], valid: list[bool] | None = None) -> RewardRows:
    """One-row episodes of three tokens, the first one observed."""
    count = len(scores)
    return RewardRows(
        np.array(groups),
        np.arange(count),
        [np.array([0.0, 0.0, s]) for s in scores],
        [np.array([False, True, True]) for _ in scores],
        np.array([True] * count if valid is None else valid),
        [np.zeros(3) for _ in scores],
        baseline_D=np.full(count, scores[0]),
        log_ratios=[np.zeros(3) for _ in scores],
    )


# ---- slow references: plain Python floats, one token after the other


def slow_scores(rows: RewardRows) -> dict[tuple[int, int], float]:
    scores: dict[tuple[int, int], float] = {}
    for d in range(len(rows.masks)):
        if rows.valid_D[d]:
            key = (int(rows.group_D[d]), int(rows.episode_D[d]))
            scores[key] = scores.get(key, 0.0) + sum(float(r) for r in rows.rewards[d])
    return scores


def slow_group(rows: RewardRows, name: str, eps: float) -> list[list[float]]:
    scores = slow_scores(rows)
    out = []
    for d, mask in enumerate(rows.masks):
        key = (int(rows.group_D[d]), int(rows.episode_D[d]))
        advantage = 0.0
        if key in scores:
            own = scores[key]
            group = [s for (g, _), s in scores.items() if g == key[0]]
            others = [s for k, s in scores.items() if k[0] == key[0] and k != key]
            mean = sum(group) / len(group)
            if len(group) > 1 and name == "grpo":
                std = math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
                advantage = (own - mean) / (std + eps)
            elif len(group) > 1 and name == "dr_grpo":
                advantage = own - mean
            elif len(group) > 1 and name == "rloo":
                advantage = own - sum(others) / len(others)
        out.append([advantage if m else 0.0 for m in mask])
    return out


def slow_tokens(rows: RewardRows) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(row, position) of the sampled tokens of each valid episode, in order."""
    tokens: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for d, mask in enumerate(rows.masks):
        for position, sampled in enumerate(mask):
            if sampled and rows.valid_D[d]:
                tokens.setdefault((int(rows.group_D[d]), int(rows.episode_D[d])), []).append((d, position))
    return tokens


def slow_whitened(rows: RewardRows, raw: dict[tuple[int, int], float], eps: float) -> list[list[float]]:
    mean = sum(raw.values()) / len(raw)
    std = math.sqrt(sum((x - mean) ** 2 for x in raw.values()) / len(raw))
    return [
        [(raw[d, t] - mean) / (std + eps) if (d, t) in raw else 0.0 for t in range(len(mask))]
        for d, mask in enumerate(rows.masks)
    ]


def slow_returns(rows: RewardRows, gamma: float) -> dict[tuple[int, int], float]:
    out = {}
    for tokens in slow_tokens(rows).values():
        for i, at in enumerate(tokens):
            out[at] = sum(gamma ** (j - i) * rows.rewards[d][t] for j, (d, t) in enumerate(tokens) if j >= i)
    return out


def slow_gae(rows: RewardRows, gamma: float, lam: float) -> dict[tuple[int, int], float]:
    """The double sum of the paper (equation 16), not the recursion."""
    out = {}
    for tokens in slow_tokens(rows).values():
        value = [float(rows.values[d][t]) for d, t in tokens] + [0.0]
        delta = [rows.rewards[d][t] + gamma * value[i + 1] - value[i] for i, (d, t) in enumerate(tokens)]
        for i, at in enumerate(tokens):
            out[at] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(tokens) - i))
    return out


def assert_rows(got: list[np.ndarray], want: list[list[float]]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == np.float64
        np.testing.assert_allclose(g, np.array(w), rtol=1e-12, atol=1e-12)


# ---- values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_equal_the_slow_loop(name: str, seed: int) -> None:
    rows = make_rows(seed)
    cfg = dict(eps=1e-3)
    assert_rows(advantages_of(name, rows, cfg).advantages, slow_group(rows, name, 1e-3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_plus_plus_equals_the_slow_loop(gamma: float, seed: int) -> None:
    rows = make_rows(seed)
    cfg = dict(gamma=gamma, eps=1e-3)
    got = advantages_of("reinforce++", rows, cfg)
    assert_rows(got.advantages, slow_whitened(rows, slow_returns(rows, gamma), 1e-3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_equals_the_double_sum(gamma: float, lam: float, seed: int) -> None:
    rows = make_rows(seed)
    cfg = dict(gamma=gamma, lam=lam, eps=1e-3)
    got = advantages_of("gae", rows, cfg)
    raw = slow_gae(rows, gamma, lam)
    assert_rows(got.advantages, slow_whitened(rows, raw, 1e-3))
    want = []
    for d, mask in enumerate(rows.masks):
        row = []
        for t in range(len(mask)):
            value = float(rows.values[d][t])
            row.append(0.0 if not mask[t] else value + raw[d, t] if rows.valid_D[d] else value)
        want.append(row)
    assert_rows(got.returns, want)


def test_gae_with_lambda_1_has_discounted_returns_as_targets() -> None:
    rows = make_rows(7)
    got = advantages_of("gae", rows, dict(gamma=0.7, lam=1.0))
    for (d, t), want in slow_returns(rows, 0.7).items():
        assert got.returns[d][t] == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_two_turns_by_hand() -> None:
    """One episode, two rows: the state after turn one's last token is turn two's first token, not the observation."""
    rows = RewardRows(
        np.array([0, 0]),
        np.array([0, 0]),
        [np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0, 2.0])],
        [np.array([False, True, True]), np.array([False, False, True, True])],
        np.array([True, True]),
        [np.array([9.0, 0.5, 0.25]), np.array([9.0, 9.0, 0.125, 1.0])],
    )
    got = advantages_of("gae", rows, dict(gamma=0.5, lam=0.0))
    # returns are r + gamma * V(next sampled)
    np.testing.assert_allclose(got.returns[0], [0, 0.5 * 0.25, 1 + 0.5 * 0.125])
    np.testing.assert_allclose(got.returns[1], [0, 0, 0.5 * 1.0, 2.0])


# ---- edges


def test_equal_scores_and_single_episodes_get_exactly_zero() -> None:
    rows = simple([0.1, 0.1, 0.1, 5.0], [1, 1, 1, 2])
    for eps in (1e-6, 0.0):
        for row in advantages_of("grpo", rows, dict(eps=eps)).advantages:
            assert (row == 0).all()
    for name in ("dr_grpo", "rloo"):
        advantages = advantages_of(name, rows, {}).advantages
        np.testing.assert_allclose(np.stack(advantages), 0.0, atol=1e-16)
        assert (advantages[3] == 0).all()


def test_an_episode_without_a_score_leaves_the_baseline() -> None:
    with_it = simple([1.0, 0.0, np.nan, 0.5], [1, 1, 1, 1], [True, True, False, True])
    without = simple([1.0, 0.0, 0.5], [1, 1, 1])
    for name in ADVANTAGES.names():
        got = advantages_of(name, with_it, {}).advantages
        want = advantages_of(name, without, {}).advantages
        assert (got[2] == 0).all()
        np.testing.assert_array_equal(np.stack([got[0], got[1], got[3]]), np.stack(want))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_sum_to_zero_over_a_groups_episodes(name: str) -> None:
    rows = make_rows(3)
    got = advantages_of(name, rows, {}).advantages
    sums: dict[int, float] = {}
    seen = set()
    for d, row in enumerate(got):
        key = (int(rows.group_D[d]), int(rows.episode_D[d]))
        if key not in seen:
            seen.add(key)
            sums[key[0]] = sums.get(key[0], 0.0) + float(row[rows.masks[d]][0])
        assert len(set(row[rows.masks[d]].tolist())) == 1  # constant over an episode
    np.testing.assert_allclose(list(sums.values()), 0.0, atol=1e-6)


def test_masks_without_a_token_and_batches_without_a_spread() -> None:
    empty = RewardRows(
        np.array([0]), np.array([0]), [np.zeros(3)], [np.zeros(3, dtype=bool)], np.array([True]), [np.full(3, np.nan)]
    )
    empty.baseline_D, empty.log_ratios = np.zeros(1), [np.full(3, np.nan)]
    constant = simple([2.0, 2.0], [0, 0])
    for name in ADVANTAGES.names():
        got = advantages_of(name, empty, {})
        assert (got.advantages[0] == 0).all() and np.isfinite(got.advantages[0]).all()
        got = advantages_of(name, constant, dict(eps=0.0))
        assert (np.stack(got.advantages) == 0).all() or name in ("vapo", "vtrace")  # by lambda; not whitened
    one = RewardRows(np.array([0]), np.array([0]), [np.ones(1)], [np.ones(1, dtype=bool)], np.array([True]))
    assert advantages_of("reinforce++", one, dict(eps=0.0)).advantages[0].tolist() == [0.0]


# ---- rounding

EQUAL = [  # scores that a person calls equal, as the rewards of each episode's turns
    [[10.1, 0.2], [10.3], [10.2, 0.1], [9.9, 0.4]],
    [[100.1, 0.2], [100.3], [100.2, 0.1], [99.9, 0.4]],
    [[1e6, 0.3], [1e6 + 0.1, 0.2], [1e6 + 0.3], [1e6 - 0.1, 0.4]],
    [[1e6, -1e6, 0.3], [0.3], [0.1, 0.2], [0.1] * 3],
    [[0.1] * 1000, [100.0], [0.2] * 500, [0.5] * 200],
    [[-0.1, -0.2], [-0.3], [-0.2, -0.1], [0.3 - 0.6]],
    [[1e-9, 2e-9], [3e-9], [1.5e-9] * 2, [1e-9] * 3],
    [[0.0], [0.0, 0.0], [-0.0], [0.1, -0.1], [5e-324]],
]
ULP = float(np.spacing(1e6))
UNEQUAL = [
    [[1.0], [1.0 + 1e-12]],
    [[1e6], [1e6 + 1e3 * ULP]],
    [[1e-12], [2e-12]],
    [[0.0], [1e-140]],
    [[1e6, -1e6, 1e-6], [0.0]],
]


def played(groups: list[list[list[float]]], dtype: type = np.float64) -> RewardRows:
    """Each turn is two tokens with the reward on the second; every episode is one row."""
    turns = [(g, e, turns) for g, group in enumerate(groups) for e, turns in enumerate(group)]
    rewards = [np.array([x for turn in one for x in (0.0, turn)], dtype) for _, _, one in turns]
    return RewardRows(
        np.array([g for g, _, _ in turns]),
        np.array([e for _, e, _ in turns]),
        rewards,
        [np.ones(len(r), bool) for r in rewards],
        np.ones(len(turns), bool),
        [np.full(len(r), 0.7, np.float32) for r in rewards],
    )


@pytest.mark.parametrize("name", ["grpo", "grpo_batch_std", "dr_grpo", "rloo", "opo"])
def test_scores_that_differ_by_rounding_have_no_advantage(name: str) -> None:
    got = advantages_of(name, played(EQUAL), {"eps": 0.0}).advantages
    assert all((row == 0).all() for row in got)
    single = played([[[0.3], [np.float32(0.1) + np.float32(0.2)]]], np.float32)
    assert all((row == 0).all() for row in advantages_of(name, single, {"eps": 0.0}).advantages)
    got = advantages_of(name, played(UNEQUAL), {"eps": 0.0}).advantages
    assert all((row != 0).all() for row in got)


@pytest.mark.parametrize("name", ["reinforce++", "gae"])
@pytest.mark.parametrize("group", EQUAL)
def test_batches_that_differ_by_rounding_are_not_whitened(name: str, group: list[list[float]]) -> None:
    """The reward of a whole episode on its last token, and with it tokens whose returns all are the same."""
    rows = played([[[math.fsum(turns)] for turns in group]])
    wobbled = [np.nextafter(r, np.inf) if i % 2 else r for i, r in enumerate(rows.rewards)]
    rows.rewards = [np.where(np.arange(len(r)) == 1, r, 0.0) for r in wobbled]
    got = advantages_of(name, rows, {"eps": 0.0})
    assert all((row == 0).all() for row in got.advantages)
    rows.rewards[0] = rows.rewards[0] + np.array([0.0, 1.0])
    got = advantages_of(name, rows, {"eps": 0.0})
    assert max(abs(row).max() for row in got.advantages) > 1.0


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES.names()) - {"maxrl", "gae", "vapo", "vtrace"}))
def test_what_all_scores_have_in_common_costs_no_digit(name: str) -> None:
    """1e8 more for every episode is a baseline's business, whole to the last digit; maxrl's divisor is the mean itself,
    and a critic would have to know the 1e8 in float32."""
    scores, groups = [0.0, 0.125, 1.0, 0.5, 0.25, 0.0, 0.875], [0, 0, 0, 0, 1, 1, 1]
    params = {"eps": 1e-9, "k": 2}
    want = advantages_of(name, simple(scores, groups), params).advantages
    got = advantages_of(name, simple([1e8 + s for s in scores], groups), params).advantages
    np.testing.assert_allclose(np.stack(got), np.stack(want), rtol=0, atol=1e-13)
    assert np.abs(np.stack(want)).max() > 0.1


def test_filters_of_groups_and_advantages_say_the_same() -> None:
    for groups, kept in ((EQUAL, False), (UNEQUAL, True)):
        scored = [[score_of(turns) for turns in group] for group in groups]
        scales = [max(scale for _, scale in group) for group in scored]
        keep_P = zero_variance_groups([[score for score, _ in group] for group in scored], scales)
        assert keep_P.tolist() == [kept] * len(groups)


@pytest.mark.parametrize("discount", [0.0, 0.37, 1.0])
def test_sums_to_come_have_the_bits_of_a_loop(discount: float, monkeypatch) -> None:
    monkeypatch.setattr(advantages, "EPISODES_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=n).astype(t) for n, t in zip((5, 1, 0, 9, 2, 0, 7), "dfdfddd", strict=True)]
    for x, got in zip(tokens, advantages.sums_to_come(tokens, discount), strict=True):
        want = x.astype(np.float64)
        for t in range(len(x) - 2, -1, -1):
            want[t] += discount * want[t + 1]
        np.testing.assert_array_equal(got, want)
    same = advantages.sums_to_come(tokens, [np.full(len(x), discount) for x in tokens])
    for a, b in zip(same, advantages.sums_to_come(tokens, discount), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- ranks


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES.names()) - {"maxrl"}))  # whose scores are not below 0
def test_ranks_do_not_matter_and_call_all_sum_equally_often(name: str, over_ranks) -> None:
    rows = make_rows(1, num_groups=6)
    cfg = dict(gamma=0.9, lam=0.8, k=2)
    whole = advantages_of(name, rows, cfg)
    groups = sorted(set(rows.group_D.tolist()))
    for owners in ([0] * 6, [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 2], [2, 1, 0, 0, 1, 2]):  # some ranks have no rows
        for num_ranks in (max(owners) + 1, max(owners) + 2):
            owner = dict(zip(groups, owners, strict=True))
            keep = [[d for d, g in enumerate(rows.group_D.tolist()) if owner[g] == r] for r in range(num_ranks)]

            def work(rank, all_reduce_sum, keep=keep):
                return advantages_of(name, take(rows, keep[rank]), cfg, all_reduce_sum)

            results, calls = over_ranks(num_ranks, work)
            assert len(set(calls)) == 1
            for rank in range(num_ranks):
                for i, d in enumerate(keep[rank]):
                    np.testing.assert_allclose(results[rank].advantages[i], whole.advantages[d], rtol=1e-12, atol=1e-12)
                    if whole.returns is not None:
                        np.testing.assert_array_equal(results[rank].returns[i], whole.returns[d])


# ---- refusals and helpers


def test_gae_without_values_and_broken_rows_are_refused() -> None:
    with pytest.raises(UserError, match="gae"):
        advantages_of("gae", make_rows(0, with_values=False), {})
    mask = [np.array([False, True])] * 3
    zeros = [np.zeros(2)] * 3
    yes = np.array([True] * 3)
    with pytest.raises(RuntimeError, match="stand together"):
        RewardRows(np.zeros(3, int), np.array([0, 1, 0]), zeros, mask, yes).episodes()
    with pytest.raises(RuntimeError, match="not sampled"):
        RewardRows(np.zeros(3, int), np.arange(3), [np.ones(2)] * 3, mask, yes)
    with pytest.raises(RuntimeError, match="not finite"):
        RewardRows(np.zeros(3, int), np.arange(3), [np.array([0.0, np.nan])] * 3, mask, yes)
    with pytest.raises(RuntimeError, match="equal lengths"):
        RewardRows(np.zeros(3, int), np.arange(3), [np.zeros(3)] * 3, mask, yes)
    with pytest.raises(RuntimeError, match="valid in one row"):
        RewardRows(np.zeros(2, int), np.zeros(2, int), zeros[:2], mask[:2], np.array([True, False])).episodes()
    with pytest.raises(RuntimeError, match="different numbers"):
        RewardRows(np.zeros(2, int), np.zeros(3, int), zeros, mask, yes)


def test_kl_rewards_subtracts_k1_at_sampled_tokens_only() -> None:
    reward, mask = np.array([0.0, 0.0, 1.0]), np.array([False, True, True])
    logprob = np.array([np.nan, -1.0, -2.0], dtype=np.float32)
    reference = np.array([np.inf, -3.0, -1.5], dtype=np.float32)
    (got,) = kl_rewards([reward], [mask], [logprob], [reference], 0.1)
    np.testing.assert_allclose(got, [0.0, -0.1 * 2.0, 1.0 + 0.1 * 0.5])
    assert reward.tolist() == [0.0, 0.0, 1.0]  # the input is left alone
