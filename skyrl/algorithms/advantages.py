"""From rewards to one advantage per sampled token: numpy on the host, in float64; the loss alone rounds to its dtype.

Does not reduce, clip or drop anything: reductions are in reductions.py, filters in filters.py. Groups live whole on
one rank; statistics of the whole batch go through `all_reduce_sum`, which every rank calls equally often, also without
rows. Further estimators that compare the samples of a prompt: groups.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
    `bootstrap_D` is the critic's value after the row's last token for an episode that a limit cut there, else 0;
    `baseline_D` the score of a greedy answer to the row's prompt (NaN: it has none); `log_ratios` the policy's
    log-probabilities before the update minus the sampler's, read at sampled tokens only.
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
    bootstrap_D: Floats | None = None
    baseline_D: Floats | None = None
    log_ratios: list[Floats] | None = None

    def __post_init__(self) -> None:
        counts = [len(self.group_D), len(self.episode_D), len(self.rewards), len(self.masks), len(self.valid_D)]
        counts += [len(x) for x in (self.values, self.bootstrap_D, self.baseline_D, self.log_ratios) if x is not None]
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
    """One array [L] float64 per row, 0 where nothing was sampled. `returns` are the critic's targets, if it has one."""

    advantages: list[Floats]
    returns: list[Floats] | None = None


EPS = Param(1e-6, "Added to a standard deviation before division; with less than 1e-12 rounding decides", low=1e-12)
GAMMA = Param(1.0, "Discount of each sampled token", high=1.0)
LAM = Param(1.0, "GAE's lambda: 1 sums all later rewards, 0 trusts the critic after one token", high=1.0)
DDOF = Param(
    1.0, "The standard deviation divides by n - ddof: 1 that of a sample, 0 of a population", high=1.0, whole=True
)
BOOTSTRAP = Param(
    0.0,
    "1 = an episode that a length limit cut goes on with the critic's value after its last token",
    high=1.0,
    whole=True,
)


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


def spread_over(rows: RewardRows, score_of_row_D: np.ndarray) -> Advantages:
    return Advantages([np.where(mask, a, 0.0) for mask, a in zip(rows.masks, score_of_row_D, strict=True)])


def per_group(
    rows: RewardRows, centre: Callable[..., np.ndarray], *, lengths: bool = False, shift: bool = False
) -> Advantages:
    """Gives every sampled token of an episode `centre(scores of its group)[episode]`. Groups without variance, such as
    groups of one, get exactly 0, and `centre` is not asked about them. With `lengths` it is also given how many tokens
    each episode sampled. With `shift` the group's first score is taken off all of them, for a `centre` that goes by
    differences alone: the mean of scores of 1e8 that differ by 1 is rounded to 1e-8 otherwise."""
    spans = [span for span in rows.episodes() if rows.valid_D[span[0]]]
    members: dict[int, list[int]] = {}
    for e, (first, _) in enumerate(spans):
        members.setdefault(int(rows.group_D[first]), []).append(e)
    score_E = np.array([score_of(np.concatenate(rows.rewards[a:b]))[0] for a, b in spans])
    scale_E = np.array([rows.scale(a, b) for a, b in spans])
    length_E = np.array([sum(int(mask.sum()) for mask in rows.masks[a:b]) for a, b in spans])
    advantage_D = np.zeros(len(rows.rewards))
    for group_E in members.values():
        score_G = score_E[group_E]
        if is_rounding(np.ptp(score_G), scale_E[group_E].max()):
            continue
        more = (length_E[group_E],) if lengths else ()
        for e, advantage in zip(group_E, centre(score_G - score_G[0] * shift, *more), strict=True):
            advantage_D[spans[e][0] : spans[e][1]] = advantage
    return spread_over(rows, advantage_D)


@Advantage("grpo", params={"eps": EPS, "ddof": DDOF}, group=True, paper="2402.03300")
def grpo(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float, ddof: float) -> Advantages:
    """(R - mean) / (std + eps) over the scores R of a group, the same for every sampled token of the episode.

    Groups whose scores are equal but for rounding, and groups of one, get exactly 0. An episode of several rows has one
    score, the sum of its rewards. Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.2.
    Differs: the paper does not say which std; ours is that of a sample (n - 1), as torch.std, or with ddof 0 that of a
    population.
    """
    return per_group(rows, lambda score_G: (score_G - score_G.mean()) / (score_G.std(ddof=int(ddof)) + eps), shift=True)


@Advantage("dr_grpo", group=True, paper="2503.20783")
def dr_grpo(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R - mean over the scores of a group, without dividing by their spread.

    Source: Liu et al. 2025 (Understanding R1-Zero-Like Training), arXiv 2503.20783, section 3. Differs: the paper's
    other half, no division by the answer's length, is loss.reduction=constant.
    """
    return per_group(rows, lambda score_G: score_G - score_G.mean(), shift=True)


@Advantage("rloo", group=True, paper="2402.14740")
def rloo(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R minus the mean score of the other episodes of its group: dr_grpo times n / (n - 1).

    Groups of one have no others and get 0. Source: Kool et al. 2019 (Buy 4 REINFORCE Samples, Get a Baseline for
    Free!); Ahmadian et al. 2024, arXiv 2402.14740.
    """
    return per_group(rows, lambda score_G: (score_G - score_G.mean()) * (len(score_G) / (len(score_G) - 1)), shift=True)


def whiten(tokens: list[np.ndarray], scales: list[float], eps: float, all_reduce_sum: AllSum) -> list[np.ndarray]:
    """(x - mean) / (std + eps) over the tokens of all ranks; population std (n). Two calls of all_reduce_sum, always.

    Exactly 0 where std is rounding: `scales` says for each episode how large the numbers are that its tokens were made
    from. Two passes, because the one-pass formula E[x^2] - E[x]^2 loses every digit when the spread is small.
    """
    flat = np.concatenate(tokens) if tokens else np.zeros(0)
    scale = sum(len(x) * scale for x, scale in zip(tokens, scales, strict=True))
    count, total, scale = all_reduce_sum(np.array([len(flat), flat.sum(), scale], dtype=np.float64))
    mean, scale = total / max(count, 1.0), scale / max(count, 1.0)
    flat -= mean
    squares, rest = all_reduce_sum(np.array([np.square(flat).sum(), flat.sum()], dtype=np.float64))
    std = np.sqrt(squares / max(count, 1.0))
    if is_rounding(std, scale):
        return [np.zeros_like(x) for x in tokens]
    flat -= rest / max(count, 1.0)  # what rounding left of the mean: much, of large numbers close together
    flat /= std + eps
    return np.split(flat, np.cumsum([len(x) for x in tokens])[:-1]) if tokens else []


def join_tokens(arrays: list[Floats], masks: list[np.ndarray]) -> np.ndarray:
    """The sampled tokens of one episode's rows, end to end: what was observed is skipped."""
    parts = [array[mask] for array, mask in zip(arrays, masks, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def split_tokens(tokens: list[np.ndarray], spans: list[Span], masks: list[np.ndarray]) -> list[Floats]:
    """The inverse of join_tokens for all episodes; 0 in rows that no span names."""
    out = [np.zeros(len(mask)) for mask in masks]
    for values, (first, end) in zip(tokens, spans, strict=True):
        position = 0
        for d in range(first, end):
            count = int(np.count_nonzero(masks[d]))
            out[d][masks[d]] = values[position : position + count]
            position += count
    return out


def sums_to_come(tokens: list[np.ndarray], discount: float | list[np.ndarray]) -> list[np.ndarray]:
    """S_t = x_t + discount * S_{t+1} for the tokens of each episode, float64; S is 0 after the last one. `discount` may
    be one number per token.

    All episodes go backward together, one numpy operation for each token of the longest: the same products and sums, in
    the same order, as token by token. `EPISODES_AT_ONCE` bounds the padding.
    """
    out: list[np.ndarray] = []
    for first in range(0, len(tokens), EPISODES_AT_ONCE):
        part = tokens[first : first + EPISODES_AT_ONCE]
        longest = max(map(len, part))
        sums_TE = _padded(part, longest)
        own = discount[first : first + EPISODES_AT_ONCE] if isinstance(discount, list) else None
        discount_T: Any = _padded(own, longest) if own else [discount] * longest
        for t in range(longest - 2, -1, -1):
            sums_TE[t] += discount_T[t] * sums_TE[t + 1]
        sums_ET = np.ascontiguousarray(sums_TE.T)
        out += [sums_ET[e, longest - len(x) :] for e, x in enumerate(part)]
    return out


def _padded(part: list[np.ndarray], longest: int) -> np.ndarray:
    """[T, E]: episodes end together; padding stands before their first tokens."""
    padded_ET = np.zeros((len(part), longest))
    for e, x in enumerate(part):
        padded_ET[e, longest - len(x) :] = x
    return np.ascontiguousarray(padded_ET.T)


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
    tokens = [join_tokens(total[a:b], rows.masks[a:b]) for a, b in spans]
    scales = [float(join_tokens(sizes[a:b], rows.masks[a:b]).max()) for a, b in spans]
    per_episode = declared.group and not declared.token_rewards
    whitened = whiten([x[:1] if per_episode else x for x in tokens], scales, EPS.default, reduce)
    spread = [np.broadcast_to(x, len(of)) for x, of in zip(whitened, tokens, strict=True)]
    return Advantages(split_tokens(spread, spans, rows.masks))


@Advantage("reinforce++", params={"gamma": GAMMA, "eps": EPS}, token_rewards=True, paper="2501.03262")
def reinforce_plus_plus(rows: RewardRows, all_reduce_sum: AllSum, *, gamma: float, eps: float) -> Advantages:
    """Discounted sum of the rewards from each token to the end of its episode, whitened over the whole batch.

    The discount counts sampled tokens; rows of one episode follow each other. Without a group baseline, so
    samples_per_prompt may be 1. Source: Hu et al. 2025 (REINFORCE++), arXiv 2501.03262, section 3. Differs: the
    paper's KL penalty is kl.placement=reward; population std over all sampled tokens of all ranks.
    """
    spans = [span for span in rows.episodes() if rows.valid_D[span[0]]]
    rewards = [join_tokens(rows.rewards[first:end], rows.masks[first:end]) for first, end in spans]
    scales = [rows.scale(first, end) for first, end in spans]
    returns = sums_to_come(rewards, gamma)
    return Advantages(split_tokens(whiten(returns, scales, eps, all_reduce_sum), spans, rows.masks))


@Advantage(
    "gae",
    params={"gamma": GAMMA, "lam": LAM, "eps": EPS, "bootstrap": BOOTSTRAP},
    token_rewards=True,
    critic=True,
    paper="1506.02438",
)
def gae(
    rows: RewardRows, all_reduce_sum: AllSum, *, gamma: float, lam: float, eps: float, bootstrap: float
) -> Advantages:
    """Generalised advantage estimation over the sampled tokens of an episode, whitened over the whole batch.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next *sampled* token,
    also across turns and rows. After the last one V = 0, also for an episode that a length limit cut; with bootstrap 1
    it is the critic's value there (Pardo et al. 2018, arXiv 1712.00378). returns = unwhitened A + V. Tokens of an
    episode without a score get their own value as return, so that the critic has no error there. Raises UserError
    without values. Source: Schulman et al. 2016, arXiv 1506.02438; in PPO for language models Ouyang et
    al. 2022, arXiv 2203.02155. Differs: observations between turns are no time steps; advantages are whitened over all
    ranks (population std), returns are not.
    """
    errors = TDErrors(rows, "gae", gamma, bootstrap)
    advantages = sums_to_come(errors.deltas, gamma * lam)
    return errors.result(advantages, advantages, eps, all_reduce_sum)


class TDErrors:
    """`deltas` and `values` of the sampled tokens of each episode, float64 (deltas 0 in episodes without a score);
    `kept` are the episodes that have one. Raises UserError without values."""

    def __init__(self, rows: RewardRows, name: str, gamma: float, bootstrap: float) -> None:
        if rows.values is None:
            raise UserError(
                f"algorithm.advantage.name: {name} got no values; give the run a critic, or choose one that needs none"
            )
        last_D = rows.bootstrap_D if bootstrap else np.zeros(len(rows.masks))
        assert last_D is not None  # the loop scores what was cut with one more token
        self.rows, self.spans = rows, rows.episodes()
        critics = [join_tokens(rows.values[first:end], rows.masks[first:end]) for first, end in self.spans]
        self.values = [critic.astype(np.float64) for critic in critics]
        self.deltas, self.scales = [np.zeros_like(v) for v in self.values], []
        self.kept = [e for e, (first, _) in enumerate(self.spans) if rows.valid_D[first]]
        for e in self.kept:
            first, end = self.spans[e]
            rewards = join_tokens(rows.rewards[first:end], rows.masks[first:end])
            following = np.append(self.values[e][1:], last_D[end - 1])[: len(rewards)]
            self.deltas[e] = rewards + gamma * following - self.values[e]
            # an advantage is a sum of later rewards and of values, whose weights are at most 2 together
            largest = max(magnitude(critics[e]).max(initial=0.0), magnitude(last_D[end - 1 : end]).max())
            self.scales.append(float(rows.scale(first, end) + 2.0 * largest))

    def result(
        self, advantages: list[np.ndarray], to_values: list[np.ndarray], eps: float | None, all_reduce_sum: AllSum
    ) -> Advantages:
        """`advantages` of all episodes whitened over the batch (not with eps None); returns are `to_values` + V."""
        returns = [a + v for a, v in zip(to_values, self.values, strict=True)]
        given, spans = [advantages[e] for e in self.kept], [self.spans[e] for e in self.kept]
        whitened = given if eps is None else whiten(given, self.scales, eps, all_reduce_sum)
        masks = self.rows.masks
        return Advantages(split_tokens(whitened, spans, masks), split_tokens(returns, self.spans, masks))


@Advantage(
    "vapo",
    params={
        "gamma": GAMMA,
        "alpha": Param(0.05, "lambda of an episode of l tokens is 1 - 1 / (alpha l), at least 0", low=1e-6),
        "lam_critic": Param(1.0, "lambda of the critic's targets: 1 = the sum of later rewards", high=1.0),
        "eps": EPS,
        "bootstrap": BOOTSTRAP,
    },
    token_rewards=True,
    critic=True,
    paper="2504.05118",
)
def vapo(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float, **given: float) -> Advantages:
    """GAE whose lambda grows with the episode's length, 1 - 1 / (alpha l), and whose critic has a lambda of its own.

    A TD error reaches a constant part of the answer, however long it is, and the critic's targets do not decay. Up to
    1 / alpha tokens lambda is 0: the default, the paper's, is for long answers, the recipe's 1 for any.
    Source: Yue et al. 2025 (VAPO), arXiv 2504.05118, length-adaptive and decoupled GAE. Differs: whitened as gae's; the
    critic is pretrained by critic.warmup_steps; the paper's likelihood term on right answers is self_imitation.coef, on
    those of earlier steps.
    """
    gamma, alpha = given["gamma"], given["alpha"]
    errors = TDErrors(rows, "vapo", gamma, given["bootstrap"])
    discounts = [np.full(len(x), gamma * max(0.0, 1.0 - 1.0 / (alpha * max(1, len(x))))) for x in errors.deltas]
    to_values = sums_to_come(errors.deltas, gamma * given["lam_critic"])
    return errors.result(sums_to_come(errors.deltas, discounts), to_values, eps, all_reduce_sum)


@Advantage(
    "vtrace",
    params={
        "gamma": GAMMA,
        "lam": LAM,
        "rho_max": Param(1.0, "Largest weight of a token's TD error; decides what the critic converges to", low=1e-3),
        "c_max": Param(1.0, "Largest weight by which later TD errors are carried back"),
        "bootstrap": BOOTSTRAP,
    },
    token_rewards=True,
    critic=True,
    off_policy=True,
    paper="1802.01561",
    rule=lambda params, samples: (
        ""
        if params["c_max"] <= params["rho_max"]
        else f"params.c_max={params['c_max']:g}: must be at most params.rho_max={params['rho_max']:g}; lower it"
    ),
)
def vtrace(rows: RewardRows, all_reduce_sum: AllSum, *, gamma: float, lam: float, **given: float) -> Advantages:
    """rho_t (r_t + gamma v_{t+1} - V_t), where v are the V-trace targets, which are also the critic's returns.

    v_t - V_t = rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1}), delta_t = r_t + gamma V_{t+1} - V_t, with
    rho = min(rho_max, w), c = lam min(c_max, w) and w = exp(rows.log_ratios), policy over sampler. For data of an older
    policy; w = 1 gives the lambda-return. Source: Espeholt et al. 2018 (IMPALA), arXiv 1802.01561.
    Differs: the policy is the one before the update, recomputed; not whitened.
    """
    assert rows.log_ratios is not None
    errors = TDErrors(rows, "vtrace", gamma, given["bootstrap"])
    weights = [np.zeros_like(x) for x in errors.deltas]
    for e in errors.kept:
        a, b = errors.spans[e]
        with np.errstate(over="ignore"):
            weights[e] = np.exp(join_tokens(rows.log_ratios[a:b], rows.masks[a:b]).astype(np.float64))
    rhos = [np.minimum(given["rho_max"], w) for w in weights]
    carried = [gamma * lam * np.minimum(given["c_max"], w) for w in weights]
    to_values = sums_to_come([rho * x for rho, x in zip(rhos, errors.deltas, strict=True)], carried)
    advantages = [
        rho * (delta + gamma * np.append(corrected[1:], 0.0)[: len(delta)])
        for rho, delta, corrected in zip(rhos, errors.deltas, to_values, strict=True)
    ]
    return errors.result(advantages, to_values, None, all_reduce_sum)
