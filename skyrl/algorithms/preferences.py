"""Losses on pairs of answers, and on answers that were liked or not, with their derivatives in closed form.

Such a loss is a function of the log-probabilities of whole answers, and so of rows that may lie in different
micro-batches, or on different ranks. So they are scored first, and the derivative of the loss by an answer's
log-probability becomes the weight of each of its tokens: the engine goes on to sum, and the gradient is exact.

All arrays are [P] in float64, one entry a pair (kto: an answer): `chosen` and `rejected` are sums of log-probabilities
under the policy, `*_reference` under the frozen reference, `*_tokens` the numbers of tokens summed over. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from skyrl.types import Floats

WITHOUT_REFERENCE = ("simpo", "orpo")
MEANS = ("ipo", "simpo", "orpo")  # losses of the mean log-probability of an answer's tokens


@dataclass(frozen=True)
class Pairs:
    """What the losses read. Without a reference `*_reference` are zeros."""

    chosen: Floats
    rejected: Floats
    chosen_reference: Floats
    rejected_reference: Floats
    chosen_tokens: Floats
    rejected_tokens: Floats


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def pair_losses(
    name: str, pairs: Pairs, *, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """The loss `name` of each pair, [P]; its derivatives by `chosen` and `rejected`, [P, 2]; and both answers' implicit
    rewards as TRL logs them, [P, 2]. With h the difference, chosen minus rejected, of the log-ratios to the reference:

    dpo: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing. Source: Rafailov et al. 2023,
    arXiv 2305.18290, equation 7; smoothing: Mitchell 2023 (cDPO).
    ipo: (h - 1 / (2 beta))^2. Source: Azar et al. 2023, arXiv 2310.12036, equation 17. Differs: log-ratios are means
    over tokens, as in TRL.
    simpo: as dpo of beta d - gamma, d the difference of the policy's own mean log-probabilities. Source: Meng et al.
    2024, arXiv 2405.14734, equation 6.
    orpo: the mean negative log-probability of the chosen answer's tokens, minus beta log sigmoid(log odds ratio), odds
    those of the mean log-probability. Source: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7. Differs: the first
    part is of the answer, TRL's of the prompt too.
    """
    per_chosen, per_rejected = (
        (1.0 / np.maximum(n, 1.0) if name in MEANS else np.ones_like(n))
        for n in (pairs.chosen_tokens, pairs.rejected_tokens)
    )
    chosen = (pairs.chosen - pairs.chosen_reference) * per_chosen
    rejected = (pairs.rejected - pairs.rejected_reference) * per_rejected
    if name == "ipo":
        off = chosen - rejected - 1.0 / (2.0 * beta)
        losses, slope = off * off, 2.0 * off
        by_chosen, by_rejected = slope, -slope
    elif name == "orpo":
        # log(1 - p) at p = exp(mean), which rounding may let reach 1
        rest_chosen, rest_rejected = (np.log(-np.expm1(np.minimum(x, -1e-12))) for x in (chosen, rejected))
        log_odds = chosen - rejected - (rest_chosen - rest_rejected)
        losses = beta * np.logaddexp(0.0, -log_odds) - chosen
        slope = -beta * sigmoid(-log_odds)
        by_chosen, by_rejected = slope * np.exp(-rest_chosen) - 1.0, -slope * np.exp(-rest_rejected)
    else:
        margin = beta * (chosen - rejected) - (gamma if name == "simpo" else 0.0)
        losses = (1 - label_smoothing) * np.logaddexp(0.0, -margin) + label_smoothing * np.logaddexp(0.0, margin)
        slope = beta * (label_smoothing * sigmoid(margin) - (1 - label_smoothing) * sigmoid(-margin))
        by_chosen, by_rejected = slope, -slope
    slopes = np.stack([by_chosen * per_chosen, by_rejected * per_rejected], 1)
    return losses, slopes, beta * np.stack([chosen, rejected], 1)


def kto_losses(
    ratios: Floats, liked: np.ndarray, kl: float, *, beta: float, weights: tuple[float, float]
) -> tuple[Floats, Floats]:
    """weight (1 - sigmoid(beta (ratio - kl))) of an answer that was liked, weight (1 - sigmoid(beta (kl - ratio))) of
    one that was not, and the derivatives by `ratios`, the log-ratios of whole answers to the reference.

    `kl` is no part of the gradient. `weights`: of liked answers, of others. Source: Ethayarajh et al. 2024,
    arXiv 2402.01306, equation 8. Differs: a step's mean is over all its answers.
    """
    sign = np.where(liked, 1.0, -1.0)
    scale = np.where(liked, *weights)
    score = sign * beta * (ratios - kl)
    short = sigmoid(-score)  # 1 - sigmoid(score), with all its digits
    return scale * short, -scale * sign * beta * sigmoid(score) * short


def reward_losses(rewards: Floats, *, margin: Floats | float = 0.0, center_coef: float = 0.0) -> tuple[Floats, Floats]:
    """-log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2 of rewards [P, 2], chosen first; and
    the derivatives by both, [P, 2].

    Source: Bradley and Terry 1952 as in Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: Touvron et al. 2023,
    arXiv 2307.09288, equation 2; centring: Eisenstein et al. 2023, arXiv 2312.09244.
    """
    gap, total = rewards[:, 0] - rewards[:, 1] - margin, rewards.sum(1)
    slope, centre = -sigmoid(-gap), 2.0 * center_coef * total
    losses = np.logaddexp(0.0, -gap) + center_coef * total * total
    return losses, np.stack([slope + centre, -slope + centre], 1)


def divergence(student_LK: Floats, teacher_LK: Floats, beta: float, *, whole: bool) -> tuple[Floats, Floats]:
    """The generalised Jensen-Shannon divergence of student and teacher at each position, [L] in nats, and weights
    [L, K] with which the student's log-probabilities have its gradient: dD = sum_k weights_k d log p_k.

    beta 1: KL(student || teacher), 0: KL(teacher || student), between: beta KL(teacher || m) + (1 - beta)
    KL(student || m) with m = beta teacher + (1 - beta) student. Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649,
    section 2 and equation 1. Differs: unless K is the `whole` vocabulary, all other tokens count as one more, so that
    it is a divergence still, and at most the whole one.
    """
    student, teacher = (_with_rest(x, whole) for x in (student_LK, teacher_LK))
    p, q = np.exp(student), np.exp(teacher)
    if beta == 1.0:
        terms, slope = p * (student - teacher), student - teacher
    elif beta == 0.0:
        terms, slope = q * (teacher - student), -np.exp(teacher - student)
    else:
        mixed = np.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))
        terms = beta * q * (teacher - mixed) + (1 - beta) * p * (student - mixed)
        slope = (1 - beta) * (student - mixed)
    # The rest's probability is 1 - the sum of the others': it moves against theirs.
    return terms.sum(1), (p * (slope if whole else slope - slope[:, -1:]))[:, : student_LK.shape[1]]


def _with_rest(logprobs_LK: Floats, whole: bool) -> Floats:
    """With one more column, unless they are the whole vocabulary: the log-probability of all other tokens together, of
    no less than 1e-9, since below that the rounding of the others decides."""
    logprobs = np.maximum(np.asarray(logprobs_LK, np.float64), -300.0)
    rest = np.log(np.maximum(1.0 - np.exp(logprobs).sum(1, keepdims=True), 1e-9))
    return logprobs if whole else np.concatenate([logprobs, rest], axis=1)
