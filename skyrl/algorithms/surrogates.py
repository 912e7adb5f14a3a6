"""Policy losses beyond those of losses.py, under the same contract: soft trust regions and such of divergence, ratios
of whole rows (a row is the sequence, and whole in its micro-batch), and the covariance methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl.algorithms.corrections import sum_by_row, trained_tokens
from skyrl.algorithms.declare import Loss, Param, Rule
from skyrl.algorithms.losses import (
    MAX_LOG_RATIO,
    PPO,
    base_logprobs,
    clip_bounds,
    clipped_surrogate,
    log_ratios,
    nowhere,
    present,
    ratio_metrics,
    surrogate,
)
from skyrl.types import ForwardOutput, Microbatch

if TYPE_CHECKING:
    from torch import Tensor

    Result = tuple[Tensor, dict[str, Tensor]]

GATE_END = 50.0  # a log-ratio from which on sapo's gate is open in every digit; exp of more may be infinite


def _declare(name: str, paper: str, *, selects: bool = False, rule: Rule | None = None, **params: Param) -> Loss:
    needs = ("sampling_logprobs", "advantages", *(["selected"] if selects else []))
    return Loss(name, needs=needs, params=params, ratio=True, paper=paper, wire=None, rule=rule)


@_declare(
    "sapo",
    "2511.20347",
    tau_pos=Param(1.0, "Steepness of the gate where the advantage is above 0", low=1e-3),
    tau_neg=Param(1.05, "Steepness of the gate elsewhere; a larger one fades faster", low=1e-3),
    max_log_ratio=MAX_LOG_RATIO,
)
def sapo(outputs: ForwardOutput, rows: Microbatch, *, tau_pos: float, tau_neg: float, max_log_ratio: float) -> Result:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a gate with slope 1 at r = 1 that fades on both sides, in place of a clip.

    Source: Gao et al. 2025 (Soft Adaptive Policy Optimization), arXiv 2511.20347. Differs: the mean over a sequence is
    loss.reduction=sequence_mean.
    """
    log_ratio_T = log_ratios(outputs, rows, max_log_ratio)
    ratio_T, advantages_T = log_ratio_T.clamp(max=GATE_END).exp(), present(rows.advantages_T)
    tau_T = ratio_T.new_full((), tau_pos).where(advantages_T > 0, ratio_T.new_full((), tau_neg))
    gate_T = (tau_T * (ratio_T - 1.0)).sigmoid() * (4.0 / tau_T)
    return -gate_T * advantages_T, ratio_metrics(ratio_T, nowhere(ratio_T), log_ratio_T)


@_declare(
    "gmpo",
    "2507.20673",
    log_clip_low=Param(0.4, "A token's ratio may fall to exp(-log_clip_low)"),
    log_clip_high=Param(0.4, "A token's ratio may rise to exp(log_clip_high)"),
)
def gmpo(outputs: ForwardOutput, rows: Microbatch, *, log_clip_low: float, log_clip_high: float) -> Result:
    """-A s, with s the geometric mean of a row's token ratios, each clipped first where its advantage pushes it.

    Source: Zhao et al. 2025 (Geometric-Mean Policy Optimization), arXiv 2507.20673, whose range is (e^-0.4, e^0.4).
    Differs: each token has its own advantage; with one per row and loss.reduction=sequence_mean it is the paper's.
    """
    log_ratio_T, advantages_T = log_ratios(outputs, rows), present(rows.advantages_T)
    bounded_T = log_ratio_T.detach().clamp(-log_clip_low, log_clip_high)
    clipped_T = advantages_T.sign() * (log_ratio_T.detach() - bounded_T) > 0
    trained_T = trained_tokens(rows)
    count_S = sum_by_row(trained_T.to(log_ratio_T.dtype), rows).clamp(min=1.0)
    held_T = bounded_T.where(clipped_T, log_ratio_T).where(trained_T & (advantages_T != 0), 0.0)
    ratio_T = (sum_by_row(held_T, rows) / count_S).exp()[rows.row_T]
    return -ratio_T * advantages_T, ratio_metrics(ratio_T, clipped_T, log_ratio_T)


def _within(outputs: ForwardOutput, rows: Microbatch, limit: float, divergence_T: Tensor, delta: float) -> Result:
    """-r A, and 0 for tokens that move away from the base while they are further than delta."""
    log_ratio_T, advantages_T = log_ratios(outputs, rows, limit), present(rows.advantages_T)
    beyond_T = (advantages_T * log_ratio_T.detach() > 0) & (divergence_T > delta)
    metrics = ratio_metrics(log_ratio_T.exp(), beyond_T, log_ratio_T)
    return surrogate(log_ratio_T.where(~beyond_T, 0.0), rows).where(~beyond_T, 0.0), metrics


def _delta(default: float) -> Param:
    return Param(default, "Divergence from the base above which a token is not pushed further away", low=1e-6)


@_declare("dppo_tv", "2602.04879", delta=_delta(0.15), max_log_ratio=MAX_LOG_RATIO)
def dppo_tv(outputs: ForwardOutput, rows: Microbatch, *, delta: float, max_log_ratio: float) -> Result:
    """-M r A, where M = 0 for tokens that move away from the base while |pi - base| (probabilities) is above delta.

    Rare tokens may change by large factors, frequent ones not by much mass. Source: Qi et al. 2026 (Rethinking the
    Trust Region in LLM Reinforcement Learning), arXiv 2602.04879, DPPO-Binary-TV. Differs: the base is the policy
    before the update where it was recomputed, else the sampler's, which is the paper's.
    """
    moved_T = (outputs.logprobs_T.detach().exp() - base_logprobs(rows).exp()).abs()
    return _within(outputs, rows, max_log_ratio, moved_T, delta)


@_declare("dppo_kl", "2602.04879", delta=_delta(0.05), max_log_ratio=MAX_LOG_RATIO)
def dppo_kl(outputs: ForwardOutput, rows: Microbatch, *, delta: float, max_log_ratio: float) -> Result:
    """dppo_tv with another divergence: KL(base || pi) of the two outcomes "this token" and "any other".

    Source: Qi et al. 2026, arXiv 2602.04879, DPPO-Binary-KL. Differs: as dppo_tv.
    """
    logprobs_T, base_T = outputs.logprobs_T.detach(), base_logprobs(rows)
    rest_T, base_rest_T = ((-x.expm1()).clamp(min=0.0) for x in (logprobs_T, base_T))  # 1 - p
    other_T = (base_rest_T * (base_rest_T.log() - rest_T.log())).where(base_rest_T > 0, 0.0)  # 0 log 0 is 0
    return _within(outputs, rows, max_log_ratio, base_T.exp() * (base_T - logprobs_T) + other_T, delta)


FRACTION = Param(2e-4, "Part of the batch's tokens that is selected, at least one", low=1e-9, high=1.0)


@_declare(
    "clip_cov",
    "2505.22617",
    selects=True,
    rule=lambda params, samples: (
        ""
        if params["cov_low"] < params["cov_high"]
        else f"params.cov_low={params['cov_low']:g}: must be below params.cov_high={params['cov_high']:g}; lower it"
    ),
    clip_low=PPO.params["clip_low"],
    clip_high=PPO.params["clip_high"],
    fraction=FRACTION,
    cov_low=Param(1.0, "Tokens of a covariance above this may be selected"),
    cov_high=Param(5.0, "Tokens of a covariance below this may be selected"),
)
def clip_cov(
    outputs: ForwardOutput, rows: Microbatch, *, clip_low: float, clip_high: float, **of_rows: float
) -> Result:
    """ppo, with loss 0 at the selected tokens: some, drawn among those of high covariance (selection.py).

    Source: Cui et al. 2025 (The Entropy Mechanism of RL for Reasoning Language Models), arXiv 2505.22617, Clip-Cov.
    Differs: tokens are selected once for an optimizer step, over all ranks, by the base's log-probabilities.
    """
    log_ratio_T, selected_T = log_ratios(outputs, rows), present(rows.selected_T) != 0
    ratio_T = log_ratio_T.exp()
    bounds = clip_bounds(clip_low, clip_high, ratio_T, rows)
    loss_T, clipped_T = clipped_surrogate(log_ratio_T.where(~selected_T, 0.0), rows, *bounds)
    return loss_T.where(~selected_T, 0.0), ratio_metrics(ratio_T, clipped_T | selected_T, log_ratio_T)


@_declare(
    "kl_cov",
    "2505.22617",
    selects=True,
    fraction=FRACTION,
    penalty=Param(1.0, "Weight of |log pi - base| at the selected tokens"),
)
def kl_cov(outputs: ForwardOutput, rows: Microbatch, *, penalty: float, **of_rows: float) -> Result:
    """-r A, and + penalty |log pi - base| at the selected tokens, those of the highest covariance (selection.py).

    The penalty has no gradient while pi is the base, so it is of use with several updates per batch.
    Source: Cui et al. 2025, arXiv 2505.22617, KL-Cov. Differs: as clip_cov.
    """
    log_ratio_T, selected_T = log_ratios(outputs, rows), present(rows.selected_T) != 0
    loss_T = surrogate(log_ratio_T, rows) + (penalty * log_ratio_T.abs()).where(selected_T, 0.0)
    return loss_T, ratio_metrics(log_ratio_T.exp(), selected_T, log_ratio_T)


@_declare("dro_sequence", "2405.19107", beta=Param(0.05, "Strength of the pull to the base"))
def dro_sequence(outputs: ForwardOutput, rows: Microbatch, *, beta: float) -> Result:
    """-(A log pi - beta / 2 S (log pi - base)), S the row's sum of log pi - base: beta S^2 / 2 when summed over a row.

    With equal weights in a row (loss.reduction=sequence_sum) it is the paper's (R - V - beta S)^2 / (2 beta) but for a
    constant, with A = R - V. Source: Richemond et al. 2024 (Direct Reward Optimisation), arXiv 2405.19107. Differs: A
    is the advantage as chosen, no value is learned for it; the reference is the base, not a fixed model.
    """
    log_ratio_T = log_ratios(outputs, rows)
    sum_T = sum_by_row(log_ratio_T.where(trained_tokens(rows), 0.0), rows)[rows.row_T]
    loss_T = -(present(rows.advantages_T) * outputs.logprobs_T - 0.5 * beta * sum_T * log_ratio_T)
    return loss_T, ratio_metrics(log_ratio_T.exp(), nowhere(sum_T), log_ratio_T)


@_declare(
    "vespo",
    "2602.10693",
    k_pos=Param(2.0, "Power of the weight where the advantage is 0 or more"),
    lambda_pos=Param(3.0, "Decay of the weight there"),
    k_neg=Param(3.0, "Power of the weight where the advantage is below 0"),
    lambda_neg=Param(2.0, "Decay of the weight there"),
    max_log_ratio=MAX_LOG_RATIO,
)
def vespo(outputs: ForwardOutput, rows: Microbatch, *, max_log_ratio: float, **shape: float) -> Result:
    """-sg(W^k exp(lambda (1 - W))) A log pi, with W the product of a row's ratios pi / base.

    The weight is 1 at W = 1 and falls smoothly on both sides; no length normalisation. Source: Shen et al. 2026
    (VESPO), arXiv 2602.10693, section 3.4 (c1 and c2 there). Differs: max_log_ratio bounds tokens, not W.
    """
    log_ratio_T, advantages_T = log_ratios(outputs, rows, max_log_ratio).detach(), present(rows.advantages_T)
    log_weight_T = sum_by_row(log_ratio_T.where(trained_tokens(rows), 0.0), rows)[rows.row_T]
    k_T, lambda_T = (
        log_ratio_T.new_full((), shape[f"{name}_pos"]).where(
            advantages_T >= 0, log_ratio_T.new_full((), shape[f"{name}_neg"])
        )
        for name in ("k", "lambda")
    )
    phi_T = (lambda_T + k_T * log_weight_T - lambda_T * log_weight_T.exp()).exp()
    return -phi_T * advantages_T * outputs.logprobs_T, ratio_metrics(phi_T, nowhere(phi_T), log_ratio_T)
