"""Estimators that compare the samples of a prompt, beyond grpo, dr_grpo and rloo (advantages.py), and ReMax.

All give exactly 0 where scores are equal but for rounding (variance.py), and leave episodes without a score out.
"""

from __future__ import annotations

from math import comb

import numpy as np

from skyrl.algorithms import advantages as base
from skyrl.algorithms.advantages import DDOF, EPS, Advantages, AllSum, RewardRows, per_group
from skyrl.algorithms.declare import Advantage, Param
from skyrl.algorithms.variance import is_rounding, score_of
from skyrl.types import UserError


def _score(rows: RewardRows, first: int, end: int) -> float:
    return score_of(np.concatenate(rows.rewards[first:end]))[0]


@Advantage("grpo_batch_std", params={"eps": EPS, "ddof": DDOF}, group=True, paper="2508.08221")
def grpo_batch_std(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float, ddof: float) -> Advantages:
    """(R - mean of the group) / (std of all scores of the batch + eps): no group is blown up by its own small spread.

    Source: Liu et al. 2025 (Tricks or Traps? A Deep Dive into RL for LLM Reasoning; Lite PPO), arXiv 2508.08221.
    Differs: the batch is that of all ranks and of the whole step; std with n - 1, or n with ddof 0.
    """
    score_E = np.array([_score(rows, a, b) for a, b in rows.episodes() if rows.valid_D[a]])
    count, total = all_reduce_sum(np.array([len(score_E), score_E.sum()], dtype=np.float64))
    (squares,) = all_reduce_sum(np.array([np.square(score_E - total / max(count, 1.0)).sum()], dtype=np.float64))
    std = np.sqrt(squares / max(count - ddof, 1.0))
    return per_group(rows, lambda score_G: (score_G - score_G.mean()) / (std + eps), shift=True)


@Advantage("reinforce++_baseline", params={"eps": EPS}, group=True, paper="2501.03262")
def reinforce_plus_plus_baseline(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float) -> Advantages:
    """R - mean of the group, whitened over the sampled tokens of the whole batch.

    Source: Hu et al. 2025 (REINFORCE++), arXiv 2501.03262, its variant with a group baseline. Differs: population std
    over the tokens of all ranks; its k2 penalty is kl.estimator=k2.
    """
    centred = per_group(rows, lambda score_G: score_G - score_G.mean(), shift=True).advantages
    spans = [span for span in rows.episodes() if rows.valid_D[span[0]]]
    tokens = [base.join_tokens(centred[a:b], rows.masks[a:b]) for a, b in spans]
    whitened = base.whiten(tokens, [rows.scale(a, b) for a, b in spans], eps, all_reduce_sum)
    return Advantages(base.split_tokens(whitened, spans, rows.masks))


@Advantage("opo", group=True, paper="2505.23585")
def opo(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R minus the mean score of the group weighted by length: b = sum of length * R / sum of length, in sampled tokens.

    The baseline of least variance if the gradients of tokens are uncorrelated and alike in size. Source: Hao et al.
    2025 (On-Policy RL with Optimal Reward Baseline), arXiv 2505.23585.
    """
    return per_group(
        rows, lambda score_G, length_G: score_G - (length_G * score_G).sum() / length_G.sum(), lengths=True, shift=True
    )


@Advantage("maxrl", params={"eps": EPS}, group=True, paper="2602.02710")
def maxrl(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float) -> Advantages:
    """(R - mean) / (mean + eps) over the scores of a group: near the gradient of the log of the success rate.

    Prompts that are seldom solved weigh more. Raises UserError for a score below 0. Source: Tajwar et al. 2026 (Maximum
    Likelihood Reinforcement Learning), arXiv 2602.02710. Differs: scores may be between 0 and 1, or above; eps.
    """

    def centre(score_G: np.ndarray) -> np.ndarray:
        if (score_G < 0).any():
            raise UserError(
                f"algorithm.advantage.name=maxrl: a score is {score_G.min():g}; it divides by the mean score of a "
                "prompt, so rewards have to be 0 or more (1 for success); change the reward, or use grpo"
            )
        return (score_G - score_G.mean()) / (score_G.mean() + eps)

    return per_group(rows, centre)


@Advantage("remax", greedy_baseline=True, paper="2310.10505")
def remax(rows: RewardRows, all_reduce_sum: AllSum) -> Advantages:
    """R minus the score of a greedy answer to the same prompt, `rows.baseline_D`; 0 where that has none.

    Needs no group: samples_per_prompt may be 1. Source: Li et al. 2024 (ReMax), arXiv 2310.10505. Differs: one number
    per episode; a KL penalty is a term of the loss.
    """
    assert rows.baseline_D is not None  # the loop plays a greedy answer for every prompt
    advantage_D = np.zeros(len(rows.rewards))
    for a, b in rows.episodes():
        gap = _score(rows, a, b) - float(rows.baseline_D[a]) if rows.valid_D[a] else 0.0
        if not (np.isnan(gap) or is_rounding(abs(gap), rows.scale(a, b))):
            advantage_D[a:b] = gap
    return base.spread_over(rows, advantage_D)


@Advantage(
    "pass_at_k",
    params={"k": Param(4.0, "Answers of which the best counts", low=1.0, whole=True), "eps": EPS},
    group=True,
    paper="2508.10751",
    rule=lambda params, samples: (
        f"params.k={params['k']:g}: has to be below batch.samples_per_prompt={samples}, or the only subset is all of "
        "them, and no sample is better than another"
        if params["k"] >= samples
        else ""
    ),
)
def pass_at_k(rows: RewardRows, all_reduce_sum: AllSum, *, k: float, eps: float) -> Advantages:
    """(mean best score of the k-subsets with this episode - mean over all k-subsets) / (their std + eps).

    All subsets of k samples of a prompt count, by closed forms; k = 1 is grpo with ddof 0. A group with fewer than k
    scores, and one whose every subset has the same best score, gets 0. Source: Chen et al. 2025 (Pass@k Training),
    arXiv 2508.10751, its analytical form. Differs: a best score takes the place of "one is right", so that scores need
    not be 0 or 1 (as in Walder and Karkhanis 2025, arXiv 2505.15201); eps.
    """
    k = int(k)

    def centre(score_G: np.ndarray) -> np.ndarray:
        n, order, out = len(score_G), np.argsort(score_G, kind="stable"), np.zeros(len(score_G))
        x = score_G[order]
        best = np.array([comb(j, k - 1) / comb(n, k) if n >= k else 0.0 for j in range(n)])  # x[j] is a subset's best
        mean = float((best * x).sum())
        std = float(np.sqrt((best * (x - mean) ** 2).sum()))
        if not is_rounding(std, float(np.abs(x).max())):
            for i in range(n):  # subsets with this episode: it is the best, or another one above it is
                above = sum(comb(j - 1, k - 2) * x[j] for j in range(i + 1, n)) if k > 1 else 0.0
                out[order[i]] = ((comb(i, k - 1) * x[i] + above) / comb(n - 1, k - 1) - mean) / (std + eps)
        return out

    return per_group(rows, centre, shift=True)


@Advantage(
    "mt_grpo",
    params={"eps": EPS, "outcome_coef": Param(1.0, "Weight of the outcome in the turns before the last")},
    group=True,
    token_rewards=True,
    paper="2505.11821",
)
def mt_grpo(rows: RewardRows, all_reduce_sum: AllSum, *, eps: float, outcome_coef: float) -> Advantages:
    """Turn j: its reward, normalised over the j-th turns of the group, + outcome_coef * the outcome; last: the outcome.

    The outcome is the reward of an episode's last turn, normalised over the group: (x - mean) / (std + eps) with n - 1.
    A turn that no other sample of the prompt has, and turns of equal rewards, add 0. Source: Zeng et al. 2025
    (turn-level credit assignment), arXiv 2505.11821v1. Differs: the paper has two turns; here each but the last is as
    its first.
    """
    turns: dict[int, list[tuple[int, np.ndarray]]] = {}  # episode (its first row) -> row and tokens of each turn
    compared: dict[tuple[int, int], list[tuple[int, float, float]]] = {}  # (group, turn) -> (episode, reward, scale)
    for a, b in rows.episodes():
        turns[a] = [(d, t) for d in range(a, b) for t in turn_tokens(rows.masks[d])] if rows.valid_D[a] else []
        for j, (d, t) in enumerate(turns[a]):
            key = int(rows.group_D[a]), -1 if j == len(turns[a]) - 1 else j
            compared.setdefault(key, []).append((a, float(rows.rewards[d][t].sum()), rows.scale(a, b)))
    normal: dict[tuple[int, int], float] = {}  # (episode, turn; -1 the last)
    for (_, j), given in compared.items():
        reward = np.array([x for _, x, _ in given]) - given[0][1]  # as per_group shifts scores
        flat = is_rounding(np.ptp(reward), max(scale for _, _, scale in given))
        centred = np.zeros(len(given)) if flat else (reward - reward.mean()) / (reward.std(ddof=1) + eps)
        normal.update({(episode, j): float(x) for (episode, _, _), x in zip(given, centred, strict=True)})
    out = [np.zeros(len(mask)) for mask in rows.masks]
    for a, of in turns.items():
        for j, (d, t) in enumerate(of):
            out[d][t] = normal[a, -1] if j == len(of) - 1 else normal[a, j] + outcome_coef * normal[a, -1]
    return Advantages(out)


def turn_tokens(mask: np.ndarray) -> list[np.ndarray]:
    """The positions of each run of sampled tokens of a row, between observed ones: its turns, in order."""
    tokens = np.flatnonzero(mask)
    return np.split(tokens, np.flatnonzero(np.diff(tokens) > 1) + 1) if len(tokens) else []
