"""From rewards to one advantage per sampled token: numpy on the host, in float64; the loss alone rounds to its dtype.

Does not reduce, clip or drop anything: reductions are in reductions.py, filters in filters.py. Groups live whole on
one rank; statistics of the whole batch go through `all_reduce_sum`, which every rank calls equally often, also without
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from skyrl.algorithms.declare import ADVANTAGES as ADVANTAGES
from skyrl.algorithms.declare import Advantage, Param
from skyrl.algorithms.variance import is_rounding, magnitude, score_of
from skyrl.types import Floats, Ints, UserError

AllSum = Callable[[np.ndarray], np.ndarray]  # sums a small float64 vector over all ranks
Span = tuple[int, int]  # rows [first, end) of one episode
EPISODES_AT_ONCE = 256


@dataclass
class RewardRows:
    """The rows of one rank with their rewards; lists have D entries, arrays of row d have its length [L].

    An episode is named by (group, episode) and may have several rows (turns whose history was rewritten), which stand
    together in time order. `masks` is True where the model sampled the token; a turn's reward sits on its last sampled
    token and rewards are 0 elsewhere. `valid_D` is False for an episode without a score: it is in no baseline, its
    rewards are never read, and its advantages are 0. `values` are the critic's, read at sampled tokens only. `scales`
    says at each reward how large the numbers are that it was summed from, if above its magnitude (variance.py);
    `objectives` holds the rewards of each named objective before they were weighted and summed, with all names.
    Raises RuntimeError when the arrays contradict this, because then they were built wrongly.
    """

    group_D: Ints
    episode_D: Ints
    rewards: list[Floats]
    masks: list[np.ndarray]
    valid_D: np.ndarray
    values: list[Floats] | None = None
    scales: list[Floats] | None = None
    objectives: dict[str, list[Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [len(self.group_D), len(self.episode_D), len(self.rewards), len(self.masks), len(self.valid_D)]
        if self.values is not None:
            counts.append(len(self.values))
        if len(set(counts)) != 1:
            raise RuntimeError(f"RewardRows: the fields have different numbers of rows: {counts}")
        for d, (reward, mask) in enumerate(zip(self.rewards, self.masks, strict=True)):
            lengths = {len(reward), len(mask)} | ({len(self.values[d])} if self.values is not None else set())
            if len(lengths) != 1 or mask.dtype != bool:
                raise RuntimeError(f"RewardRows: row {d} needs a bool mask and equal lengths, got {sorted(lengths)}")
            if self.valid_D[d] and not np.isfinite(reward[mask]).all():
                raise RuntimeError(f"RewardRows: row {d} is valid but has a reward that is not finite")
            if self.valid_D[d] and (reward[~mask] != 0).any():
                raise RuntimeError(f"RewardRows: row {d} has a reward on a token that was not sampled")

    def scale(self, first: int, end: int) -> float:
        """How large the numbers are that the score of these rows, an episode's, was summed from."""
        sums = float(magnitude(np.concatenate(self.rewards[first:end])).sum())
        return sums if self.scales is None else max(sums, float(np.concatenate(self.scales[first:end]).sum()))

    def episodes(self) -> list[Span]:
        """The rows [first, end) of each episode, in order. Raises RuntimeError if an episode's rows stand apart."""
        spans: list[Span] = []
        seen: set[tuple[int, int]] = set()
        first = 0
        keys = list(zip(self.group_D.tolist(), self.episode_D.tolist(), strict=True))
        for d in range(1, len(keys) + 1):
            if d < len(keys) and keys[d] == keys[first]:
                continue
            if keys[first] in seen:
                raise RuntimeError(f"RewardRows: rows of episode {keys[first]} do not stand together")
            if len(set(np.asarray(self.valid_D[first:d], dtype=bool).tolist())) > 1:
                raise RuntimeError(f"RewardRows: episode {keys[first]} is valid in one row and not in another")
            seen.add(keys[first])
            spans.append((first, d))
            first = d
        return spans if keys else []


@dataclass
class Advantages:
    """One array [L] float64 per row, 0 where nothing was sampled. `returns` are the critic's targets (gae only)."""

    advantages: list[Floats]
    returns: list[Floats] | None = None


EPS = Param(1e-6, "Added to a standard deviation before division; with less than 1e-12 rounding decides", low=1e-12)
GAMMA = Param(1.0, "Discount of each sampled token", high=1.0)
LAM = Param(1.0, "GAE's lambda: 1 sums all later rewards, 0 trusts the critic after one token", high=1.0)


def kl_rewards(
    rewards: list[Floats], masks: list[np.ndarray], logprobs: list[Floats], reference: list[Floats], coef: float
) -> list[Floats]:
    """Rewards minus coef * k1 at each sampled token, float64 [L] per row; unsampled entries keep their reward.

    k1 = logprobs - reference in nats, where `logprobs` are the sampling policy's. Its sum over an episode is an
    unbiased estimate of that episode's KL, and as a reward (not a loss) its gradient is right, see kl.py.
    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2; Ouyang et al. 2022, arXiv 2203.02155.
    """
    out = []
    for reward, mask, logprob, ref in zip(rewards, masks, logprobs, reference, strict=True):
        row = np.array(reward, dtype=np.float64)
        row[mask] -= coef * (np.asarray(logprob, np.float64)[mask] - np.asarray(ref, np.float64)[mask])
        out.append(row)
    return out


def _spread(rows: RewardRows, score_of_row_D: np.ndarray) -> Advantages:
    return Advantages([np.where(mask, a, 0.0) for mask, a in zip(rows.masks, score_of_row_D, strict=True)])


def per_group(rows: RewardRows, centre: Callable[[np.ndarray], np.ndarray]) -> Advantages:
    """Gives every sampled token of an episode `centre(scores of its group)[episode]`. Groups without variance, such as
    groups of one, get exactly 0, and `centre` is not asked about them."""
    spans = [span for span in rows.episodes() if rows.valid_D[span[0]]]
    members: dict[int, list[int]] = {}
    for e, (first, _) in enumerate(spans):
        members.setdefault(int(rows.group_D[first]), []).append(e)
    score_E = np.array([score_of(np.concatenate(rows.rewards[a:b]))[0] for a, b in spans])
    scale_E = np.array([rows.scale(a, b) for a, b in spans])
    advantage_D = np.zeros(len(rows.rewards))
    for group_E in members.values():
        if is_rounding(np.ptp(score_E[group_E]), scale_E[group_E].max()):
            continue
        for e, advantage in zip(group_E, centre(score_E[group_E]), strict=True):
            advantage_D[spans[e][0] : spans[e][1]] = advantage
    return _spread(rows, advantage_D)


GRPO = Advantage("grpo", params={"eps": EPS}, group=True, paper="2402.03300")


@GRPO
def grpo(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float) -> Advantages:
    """(R - mean) / (std + eps) over the scores R of a group, the same for every sampled token of the episode.

    std is the sample standard deviation (n - 1), as torch.std; the paper does not say which. Groups whose scores are
    equal but for rounding, and groups of one, get exactly 0. An episode of several rows has one score, the sum of its
    rewards. Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.2.
    """
    return per_group(rows, lambda score_G: (score_G - score_G.mean()) / (score_G.std(ddof=1) + eps))


DR_GRPO = Advantage("dr_grpo", group=True, paper="2503.20783")


@DR_GRPO
def dr_grpo(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R - mean over the scores of a group, without dividing by their spread.

    Source: Liu et al. 2025 (Understanding R1-Zero-Like Training), arXiv 2503.20783, section 3. The paper's other
    half, no division by the answer's length, is loss.reduction=constant.
    """
    return per_group(rows, lambda score_G: score_G - score_G.mean())


RLOO = Advantage("rloo", group=True, paper="2402.14740")


@RLOO
def rloo(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R minus the mean score of the other episodes of its group: dr_grpo times n / (n - 1).

    Groups of one have no others and get 0. Source: Kool et al. 2019 (Buy 4 REINFORCE Samples, Get a Baseline for
    Free!); Ahmadian et al. 2024, arXiv 2402.14740.
    """
    return per_group(rows, lambda score_G: (score_G - score_G.mean()) * (len(score_G) / (len(score_G) - 1)))


def _whiten(tokens: list[np.ndarray], scales: list[float], eps: float, all_reduce_sum: AllSum) -> list[np.ndarray]:
    """(x - mean) / (std + eps) over the tokens of all ranks; population std (n). Two calls of all_reduce_sum, always.

    Exactly 0 where std is rounding: `scales` says for each episode how large the numbers are that its tokens were made
    from. Two passes, because the one-pass formula E[x^2] - E[x]^2 loses every digit when the spread is small.
    """
    flat = np.concatenate(tokens) if tokens else np.zeros(0)
    scale = sum(len(x) * scale for x, scale in zip(tokens, scales, strict=True))
    count, total, scale = all_reduce_sum(np.array([len(flat), flat.sum(), scale], dtype=np.float64))
    mean, scale = total / max(count, 1.0), scale / max(count, 1.0)
    (squares,) = all_reduce_sum(np.array([np.square(flat - mean).sum()], dtype=np.float64))
    std = np.sqrt(squares / max(count, 1.0))
    if is_rounding(std, scale):
        return [np.zeros_like(x) for x in tokens]
    flat -= mean
    flat /= std + eps
    return np.split(flat, np.cumsum([len(x) for x in tokens])[:-1]) if tokens else []


def _join(arrays: list[Floats], masks: list[np.ndarray]) -> np.ndarray:
    """The sampled tokens of one episode's rows, end to end: what was observed is skipped."""
    parts = [array[mask] for array, mask in zip(arrays, masks, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(tokens: list[np.ndarray], spans: list[Span], masks: list[np.ndarray]) -> list[Floats]:
    """The inverse of _join for all episodes; 0 in rows that no span names."""
    out = [np.zeros(len(mask)) for mask in masks]
    for values, (first, end) in zip(tokens, spans, strict=True):
        position = 0
        for d in range(first, end):
            count = int(np.count_nonzero(masks[d]))
            out[d][masks[d]] = values[position : position + count]
            position += count
    return out


def _sums_to_come(tokens: list[np.ndarray], discount: float) -> list[np.ndarray]:
    """S_t = x_t + discount * S_{t+1} for the tokens of each episode, float64; S is 0 after the last one.

    All episodes go backward together, one numpy operation for each token of the longest: the same products and sums, in
    the same order, as token by token. `EPISODES_AT_ONCE` bounds the padding.
    """
    out: list[np.ndarray] = []
    for first in range(0, len(tokens), EPISODES_AT_ONCE):
        part = tokens[first : first + EPISODES_AT_ONCE]
        longest = max(map(len, part))
        padded_ET = np.zeros((len(part), longest))  # episodes end together; padding stands before their first tokens
        for e, x in enumerate(part):
            padded_ET[e, longest - len(x) :] = x
        sums_TE = np.ascontiguousarray(padded_ET.T)
        for t in range(longest - 2, -1, -1):
            sums_TE[t] += discount * sums_TE[t + 1]
        padded_ET[:] = sums_TE.T
        out += [padded_ET[e, longest - len(x) :] for e, x in enumerate(part)]
    return out


def decoupled(
    declared: Advantage, params: Mapping[str, float], weights: Mapping[str, float], rows: RewardRows, reduce: AllSum
) -> Advantages:
    """The advantages of each objective by itself, as `declared` estimates them, weighted, summed and whitened.

    With grpo an objective counts by its weight then, whatever its range: in the sum of rewards the one with the largest
    spread decides, and different mixtures of objectives with equal sums are the same. Whitened is over the episodes of
    all ranks where an estimator gives all tokens of an episode the same, else over tokens; population std. `weights`
    are equal on all ranks. Source: Liu et al. 2026 (GDPO), arXiv 2601.05242, equations 4 to 6.
    """
    total = [np.zeros(len(mask)) for mask in rows.masks]
    sizes = [np.zeros(len(mask)) for mask in rows.masks]
    for name, weight in weights.items():
        if weight:
            alone = replace(rows, rewards=rows.objectives[name], scales=None, objectives={})
            for d, part in enumerate(declared.compute(alone, reduce, params=params).advantages):
                total[d] += weight * part
                sizes[d] += np.abs(weight * part)
    spans = [(a, b) for a, b in rows.episodes() if rows.valid_D[a] and any(mask.any() for mask in rows.masks[a:b])]
    tokens = [_join(total[a:b], rows.masks[a:b]) for a, b in spans]
    scales = [float(_join(sizes[a:b], rows.masks[a:b]).max()) for a, b in spans]
    whitened = _whiten([x[:1] if declared.group else x for x in tokens], scales, EPS.default, reduce)
    spread = [np.broadcast_to(x, len(of)) for x, of in zip(whitened, tokens, strict=True)]
    return Advantages(_split(spread, spans, rows.masks))


REINFORCE_PP = Advantage("reinforce++", params={"gamma": GAMMA, "eps": EPS}, token_rewards=True, paper="2501.03262")


@REINFORCE_PP
def reinforce_plus_plus(rows: RewardRows, all_reduce_sum: AllSum, *, gamma: float, eps: float) -> Advantages:
    """Discounted sum of the rewards from each token to the end of its episode, whitened over the whole batch.

    The discount counts sampled tokens; rows of one episode follow each other. Without a group baseline, so
    samples_per_prompt may be 1. The paper's KL penalty is kl.placement=reward. Population std over all sampled tokens
    of all ranks. Source: Hu 2025 (REINFORCE++), arXiv 2501.03262, section 3.
    """
    spans = [span for span in rows.episodes() if rows.valid_D[span[0]]]
    rewards = [_join(rows.rewards[first:end], rows.masks[first:end]) for first, end in spans]
    scales = [rows.scale(first, end) for first, end in spans]
    returns = _sums_to_come(rewards, gamma)
    return Advantages(_split(_whiten(returns, scales, eps, all_reduce_sum), spans, rows.masks))


GAE = Advantage(
    "gae",
    params={"gamma": GAMMA, "lam": LAM, "eps": EPS},
    token_rewards=True,
    critic=True,
    paper="1506.02438",
)


@GAE
def gae(rows: RewardRows, all_reduce_sum: AllSum, *, gamma: float, lam: float, eps: float) -> Advantages:
    """Generalised advantage estimation over the sampled tokens of an episode, whitened over the whole batch.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next *sampled* token,
    also across turns and rows; after the last one V = 0, also for episodes cut by a length limit (no bootstrap).
    returns = unwhitened A + V. Tokens of an episode without a score get their own value as return, so that the critic
    has no error there. Source: Schulman et al. 2016, arXiv 1506.02438. Raises UserError without values.
    """
    if rows.values is None:
        raise UserError(
            "algorithm.advantage.name: gae got no values; give the run a critic, or choose one that needs none"
        )
    spans = rows.episodes()
    critics = [_join(rows.values[first:end], rows.masks[first:end]) for first, end in spans]
    values = [critic.astype(np.float64) for critic in critics]
    deltas, scales = [np.zeros_like(v) for v in values], []
    kept = [e for e, (first, _) in enumerate(spans) if rows.valid_D[first]]
    for e in kept:
        first, end = spans[e]
        rewards = _join(rows.rewards[first:end], rows.masks[first:end])
        deltas[e] = rewards + gamma * np.append(values[e][1:], 0.0)[: len(rewards)] - values[e]
        # an advantage is a sum of later rewards and of values, whose weights are at most 2 together
        scales.append(float(rows.scale(first, end) + 2.0 * magnitude(critics[e]).max(initial=0.0)))
    advantages = _sums_to_come(deltas, gamma * lam)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    whitened = _whiten([advantages[e] for e in kept], scales, eps, all_reduce_sum)
    return Advantages(_split(whitened, [spans[e] for e in kept], rows.masks), _split(returns, spans, rows.masks))
