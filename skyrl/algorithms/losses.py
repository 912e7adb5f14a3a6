"""The loss of each token, unreduced: `compute_loss` for the engine, and the named losses (more in surrogates.py).

The engine sums weights_T * loss_T; nothing here averages, and no term sees how tokens are packed. Arguments reach a
loss through `sanitised` only: tokens with weight 0 are not trained, whatever their optional fields hold (NaN too).

Ratios are exp(log pi - base). The base is `old_logprobs_T` (the proximal policy) if the rows have it, else
`sampling_logprobs_T` (the behaviour policy). With a correction and no old_logprobs the base is the current policy
itself: the correction then carries the whole importance weight and the ratio is 1, so no weight is applied twice.
That is exact for the first update of a batch; for later ones it switches PPO's clipping off, so validation.py asks
for recompute_old_logprobs there.

Nothing here imports torch: the functions use the tensors' own methods, so that a login node without torch can read the
declarations.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from skyrl.algorithms.corrections import CORRECTIONS, correction_problem, sum_by_row, trained_tokens
from skyrl.algorithms.declare import LOSSES, MAY_NEED, Loss, Param, Wire
from skyrl.algorithms.kl import KL_ESTIMATORS, NEEDS_BASE
from skyrl.types import ForwardOutput, LossSpec, Microbatch, UserError

if TYPE_CHECKING:
    from torch import Tensor

    TokenMetrics = dict[str, Tensor]  # [T] tensors; the key ends in the reduction over trained tokens: "ratio:mean"
    Bound = float | Tensor  # one number, or one per token [T]

# ---- helpers of the losses; `rows` and `outputs` are sanitised from here on


def base_logprobs(rows: Microbatch) -> Tensor:
    base_T = rows.old_logprobs_T if rows.old_logprobs_T is not None else rows.sampling_logprobs_T
    assert base_T is not None  # compute_loss has checked the loss's needs
    return base_T


def clip_bounds(clip_low: Bound, clip_high: Bound, like_T: Tensor, rows: Microbatch) -> tuple[Tensor, Tensor]:
    """1 - clip_low and 1 + clip_high as tensors, of the rows' own bounds where they have them; per-token parameters
    are sanitised here as the rows are elsewhere."""
    given = (clip_low if rows.clip_low_T is None else rows.clip_low_T, rows.clip_high_T)
    low_T, high_T = (
        (like_T.new_full((), c) if isinstance(c, (int, float)) else c.to(like_T)).where(trained_tokens(rows), 0.0)
        for c in (given[0], clip_high if given[1] is None else given[1])
    )
    return 1.0 - low_T, 1.0 + high_T


def nowhere(like_T: Tensor) -> Tensor:
    """False for every token."""
    return like_T.new_zeros(like_T.shape).bool()


def log_ratios(outputs: ForwardOutput, rows: Microbatch, limit: float = 0.0) -> Tensor:
    """log pi - base, [T]; held to [-limit, limit] (and without a gradient beyond) where `limit` is not 0."""
    gap_T = outputs.logprobs_T - base_logprobs(rows)
    return gap_T.clamp(-limit, limit) if limit else gap_T


def present(x_T: Tensor | None) -> Tensor:
    """What `compute_loss` has seen to: a field that the loss needs, an output that its model gives."""
    assert x_T is not None
    return x_T


def ratio_metrics(ratio_T: Tensor, clipped_T: Tensor, log_ratio_T: Tensor) -> TokenMetrics:
    """approx_kl is k3 of KL(base || pi), with tokens drawn from the base: ratio - 1 - log ratio."""
    ratio_T, log_ratio_T = ratio_T.detach(), log_ratio_T.detach()
    return {
        "ratio:mean": ratio_T,
        "ratio:max": ratio_T,
        "clipped:mean": clipped_T.to(ratio_T.dtype),
        "approx_kl:mean": log_ratio_T.expm1() - log_ratio_T,
    }


def surrogate(log_ratio_T: Tensor, rows: Microbatch) -> Tensor:
    """-r A, and 0 where A is 0, however large the ratio is (0 times infinity would be NaN)."""
    advantages_T = present(rows.advantages_T)
    return -log_ratio_T.where(advantages_T != 0, 0.0).exp() * advantages_T


def clipped_surrogate(log_ratio_T: Tensor, rows: Microbatch, low_T: Tensor, high_T: Tensor) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A) and where the clip is active, which is where the gradient is exactly 0: also where
    the ratio is infinite, since its logarithm is taken out before exp."""
    advantages_T, ratio_T = present(rows.advantages_T), log_ratio_T.detach().exp()
    clipped_T = ((advantages_T > 0) & (ratio_T > high_T)) | ((advantages_T < 0) & (ratio_T < low_T))
    bounded_T = ratio_T.detach().maximum(low_T).minimum(high_T)
    return (-bounded_T * advantages_T).where(clipped_T, surrogate(log_ratio_T.where(~clipped_T, 0.0), rows)), clipped_T


# ---- losses


@Loss("reinforce", needs=("advantages",), wire=None)
def reinforce(outputs: ForwardOutput, rows: Microbatch) -> tuple[Tensor, TokenMetrics]:
    """-A log pi: the plain policy gradient, right for on-policy data; a correction may weight it otherwise.

    Source: Williams 1992, Simple statistical gradient-following algorithms, Machine Learning 8.
    """
    return -present(rows.advantages_T) * outputs.logprobs_T, {}


@Loss("cross_entropy", kind="supervised", many=True, wire=Wire(optional=("weights",)))
def cross_entropy(outputs: ForwardOutput, rows: Microbatch) -> tuple[Tensor, TokenMetrics]:
    """-log pi of the target in nats, or of each of K targets [T, K]. Weights may be negative.

    Source: maximum likelihood.
    """
    return -outputs.logprobs_T, {"nll:mean": -outputs.logprobs_T.detach()}


MAX_LOG_RATIO = Param(
    0.0, "|log pi - base| is held to this, and has no gradient beyond it (verl: 20); 0 = no limit", wire=False
)


@Loss(
    "importance_sampling",
    needs=("sampling_logprobs", "advantages"),
    params={"max_log_ratio": MAX_LOG_RATIO},
    ratio=True,
    paper="1707.06347",
)
def importance_sampling(
    outputs: ForwardOutput, rows: Microbatch, *, max_log_ratio: float
) -> tuple[Tensor, TokenMetrics]:
    """-(pi / base) A, unclipped: the per-token off-policy gradient; equal in gradient to reinforce on-policy.

    Source: shared by all surrogate objectives, e.g. arXiv 1707.06347 equation 6. Same as Tinker's loss of this name.
    """
    log_ratio_T = log_ratios(outputs, rows, max_log_ratio)
    metrics = ratio_metrics(log_ratio_T.exp(), nowhere(log_ratio_T), log_ratio_T)
    return surrogate(log_ratio_T, rows), metrics


PPO = Loss(
    "ppo",
    needs=("sampling_logprobs", "advantages"),
    params={
        "clip_low": Param(0.2, "The ratio may fall to 1 - clip_low", high=1.0),
        "clip_high": Param(0.2, "The ratio may rise to 1 + clip_high"),
        "dual_clip": Param(
            0.0, "With an advantage below 0 no gradient where the ratio is above this (3 is usual); 0 = off", wire=False
        ),
        "max_log_ratio": MAX_LOG_RATIO,
    },
    ratio=True,
    paper="1707.06347",
    wire=Wire(thresholds=(0.8, 1.2)),
    rule=lambda params, samples: (
        f"params.dual_clip={params['dual_clip']:g}: must be above 1 + params.clip_high, or no token of a falling "
        "advantage would learn; give 3, or 0 for off"
        if 0 < params["dual_clip"] <= 1 + params["clip_high"]
        else ""
    ),
)


@PPO
def ppo(
    outputs: ForwardOutput,
    rows: Microbatch,
    *,
    clip_low: Bound,
    clip_high: Bound,
    dual_clip: float,
    max_log_ratio: float,
) -> tuple[Tensor, TokenMetrics]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / base; clipped tokens get no gradient.

    With dual_clip c that is at least c A where A < 0. Source: Schulman et al. 2017 (PPO), arXiv 1707.06347, equation 7;
    separate bounds: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.1; dual clip: Ye et al. 2020, arXiv 1912.09729.
    """
    log_ratio_T = log_ratios(outputs, rows, max_log_ratio)
    ratio_T, advantages_T = log_ratio_T.detach().exp(), present(rows.advantages_T)
    beyond_T = (advantages_T < 0) & (ratio_T > dual_clip) if dual_clip else nowhere(ratio_T)
    bounds = clip_bounds(clip_low, clip_high, ratio_T, rows)
    loss_T, clipped_T = clipped_surrogate(log_ratio_T.where(~beyond_T, 0.0), rows, *bounds)
    loss_T, clipped_T = (-dual_clip * advantages_T).where(beyond_T, loss_T), clipped_T | beyond_T
    return loss_T, ratio_metrics(ratio_T, clipped_T, log_ratio_T)


@Loss(
    "cispo",
    needs=("sampling_logprobs", "advantages"),
    params={
        "clip_low": Param(1.0, "The ratio may fall to 1 - clip_low", high=1.0),
        "clip_high": Param(3.0, "The ratio may rise to 1 + clip_high"),
        "max_log_ratio": MAX_LOG_RATIO,
    },
    ratio=True,
    paper="2506.13585",
    wire=Wire(thresholds=(0.0, 4.0)),
)
def cispo(
    outputs: ForwardOutput, rows: Microbatch, *, clip_low: Bound, clip_high: Bound, max_log_ratio: float
) -> tuple[Tensor, TokenMetrics]:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: clipped tokens keep a gradient, of bounded weight.

    Source: MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, section 3.1. Differs: defaults bound r to [0, 4], as Tinker
    does (the paper uses no lower bound, which is clip_low=1); length normalisation lives in weights.
    """
    log_ratio_T = log_ratios(outputs, rows, max_log_ratio).detach()
    ratio_T = log_ratio_T.exp()
    low_T, high_T = clip_bounds(clip_low, clip_high, ratio_T, rows)
    weight_T = ratio_T.maximum(low_T).minimum(high_T)
    clipped_T = (ratio_T < low_T) | (ratio_T > high_T)
    return -weight_T * present(rows.advantages_T) * outputs.logprobs_T, ratio_metrics(ratio_T, clipped_T, log_ratio_T)


@Loss(
    "dro",
    needs=("sampling_logprobs", "advantages"),
    params={"beta": Param(0.05, "Strength of the pull to the base")},
    ratio=True,
    paper="2405.19107",
    wire=Wire(all_tokens=True),
)
def dro(outputs: ForwardOutput, rows: Microbatch, *, beta: float) -> tuple[Tensor, TokenMetrics]:
    """-(A log pi - beta / 2 (log pi - base)^2): policy gradient with a quadratic pull to the base, for stale data.

    Source: Richemond et al. 2024 (Direct Reward Optimisation), arXiv 2405.19107. Differs: per token, as Tinker's loss
    of this name; A (reward minus soft value) is the advantage as chosen, and no soft value is learned.
    """
    log_ratio_T = log_ratios(outputs, rows)
    loss_T = -(present(rows.advantages_T) * outputs.logprobs_T - 0.5 * beta * log_ratio_T.square())
    ratio_T = log_ratio_T.detach().exp()
    return loss_T, ratio_metrics(ratio_T, nowhere(ratio_T), log_ratio_T)


@Loss(
    "gspo",
    needs=("sampling_logprobs", "advantages"),
    params={
        "clip_low": Param(3e-4, "The ratio may fall to 1 - clip_low", high=1.0),
        "clip_high": Param(4e-4, "The ratio may rise to 1 + clip_high"),
        "max_log_ratio": MAX_LOG_RATIO,
    },
    ratio=True,
    ratio_mask=True,
    paper="2507.18071",
    # The protocol's public text gives no defaults for gspo: ppo's.
    wire=Wire(thresholds=(0.8, 1.2), optional=("sequence_ratio_mask",)),
)
def gspo(
    outputs: ForwardOutput, rows: Microbatch, *, clip_low: Bound, clip_high: Bound, max_log_ratio: float
) -> tuple[Tensor, TokenMetrics]:
    """-min(s_t A, clip(s_t) A) with s_t = sg(s) pi / sg(pi) and s = exp(mean of log pi / base over the row's tokens).

    The token form (GSPO-token): its value and clipping are the sequence's, its gradient passes through each token, so
    that per-token weights and advantages work; with one advantage per row and sequence_mean it is GSPO. The mean is
    over trained tokens of one row, or those of its ratio_mask, trained or not; max_log_ratio bounds it. Clip ranges
    made for ppo (0.2) hardly ever clip here. Source: Zheng et al. 2025 (GSPO), arXiv 2507.18071, equations 5, 13 and
    14; defaults of its section 5.1. Differs: a row is the sequence, also when an episode has several rows.
    """
    counted_T = trained_tokens(rows) if rows.ratio_mask_T is None else rows.ratio_mask_T != 0
    log_ratio_T = log_ratios(outputs, rows).detach()
    count_S = sum_by_row(counted_T.to(log_ratio_T.dtype), rows).clamp(min=1.0)
    log_sequence_T = (sum_by_row(log_ratio_T.where(counted_T, 0.0), rows) / count_S)[rows.row_T]
    log_sequence_T = log_sequence_T + (outputs.logprobs_T - outputs.logprobs_T.detach())
    if max_log_ratio:
        log_sequence_T = log_sequence_T.clamp(-max_log_ratio, max_log_ratio)
    bounds = clip_bounds(clip_low, clip_high, log_sequence_T, rows)
    loss_T, clipped_T = clipped_surrogate(log_sequence_T, rows, *bounds)
    return loss_T, ratio_metrics(log_sequence_T.exp(), clipped_T, log_ratio_T)


@Loss(
    "value",
    needs=("values", "returns"),
    params={"clip": Param(0.2, "Values may move this far from v_old; 0 = off")},
    kind="critic",
    paper="2005.12729",
    wire=None,
)
def value(outputs: ForwardOutput, rows: Microbatch, *, clip: float) -> tuple[Tensor, TokenMetrics]:
    """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2; clip 0 is the plain squared error.

    `rows.values_T` are v_old, the values the advantages were made with. Source: the clipped value loss of PPO's
    reference code (OpenAI baselines, ppo2), discussed in Engstrom et al. 2020, arXiv 2005.12729. Differs: the factor
    1/2; clip 0 is off.
    """
    values_T, returns_T = present(outputs.values_T), present(rows.returns_T)
    error_T = (values_T - returns_T).square()
    clipped_T = nowhere(error_T)
    if clip > 0:
        old_T = present(rows.values_T)
        bounded_T = old_T + (values_T - old_T).clamp(-clip, clip)
        bounded_error_T = (bounded_T - returns_T).square()
        clipped_T = bounded_error_T > error_T
        error_T = bounded_error_T.where(clipped_T, error_T)
    metrics = {
        "value_error:mean": (values_T - returns_T).detach().abs(),
        "value_clipped:mean": clipped_T.to(error_T.dtype),
        "value:mean": values_T.detach(),
        "return:mean": returns_T,
    }
    return 0.5 * error_T, metrics


# ---- what the engine calls


def sanitised(
    outputs: ForwardOutput, rows: Microbatch, also_T: Tensor | None = None
) -> tuple[ForwardOutput, Microbatch]:
    """Both arguments with 0 at every untrained token (weight 0) of every optional field and output.

    Before any arithmetic, because torch.where after it would still multiply a NaN by a zero gradient. Outputs stay
    connected to the graph, so that a microbatch of padding has a gradient (of zeros) too. Tokens where `also_T` is
    true keep what they hold as well.
    """
    kept_T = trained_tokens(rows) if also_T is None else trained_tokens(rows) | also_T

    def clean(x: Any, names: list[str]) -> Any:
        held = {name: x_T.where(kept_T, 0.0) for name in names if (x_T := getattr(x, name)) is not None}
        return replace(x, **held)

    return clean(outputs, [f.name for f in fields(ForwardOutput)]), clean(rows, [f"{name}_T" for name in MAY_NEED])


def check_spec(spec: LossSpec) -> Loss:
    """The loss that `spec` names. Raises UserError, naming the field, for anything that does not apply to it."""
    loss = LOSSES.get(spec.name, "loss")
    if unknown := sorted(set(spec.params) - set(loss.params)):
        allowed = ", ".join(sorted(loss.params)) or "none"
        raise UserError(f"loss {spec.name}: no parameter called {unknown[0]!r}; its parameters are: {allowed}")
    KL_ESTIMATORS.get(spec.kl_estimator, f"loss {spec.name}, kl_estimator")
    CORRECTIONS.get(spec.correction, f"loss {spec.name}, correction")
    if spec.correction != "none":
        if loss.kind != "policy":
            raise UserError(f"loss {spec.name}: correction {spec.correction!r} is for policy losses; use none")
        if problem := correction_problem(spec.correction, spec.correction_cap, spec.correction_low):
            raise UserError(f"loss {spec.name}: {problem}")
    if loss.kind == "critic" and (spec.kl_coef or spec.entropy_coef):
        raise UserError(f"loss {spec.name}: kl_coef and entropy_coef are for policies; set both to 0")
    return loss


def _with_fields(rows: Microbatch, names: list[str], spec: LossSpec) -> Microbatch:
    """Raises UserError if one of these fields is None, unless nothing here is trained (padding): then it is zeros."""
    missing = [name for name in names if getattr(rows, f"{name}_T") is None]
    if not missing:
        return rows
    if bool(trained_tokens(rows).any()):
        name = missing[0]
        other = " or old_logprobs" if name == "sampling_logprobs" else ""
        raise UserError(f"loss {spec.name}: the rows have no {name}{other}; give each row {name} [L]")
    zeros: dict[str, Any] = {f"{name}_T": rows.weights_T.new_zeros(rows.weights_T.shape) for name in missing}
    return replace(rows, **zeros)


def _needed_fields(loss: Loss, rows: Microbatch, spec: LossSpec) -> list[str]:
    names = [n for n in loss.needs if not (n == "sampling_logprobs" and rows.old_logprobs_T is not None)]
    if spec.correction != "none":
        names.append("sampling_logprobs")
    if spec.correction == "off_policy_sequence_mask":
        names.append("advantages")
    if spec.kl_coef != 0.0:
        names.append("reference")
        if spec.kl_estimator in NEEDS_BASE and rows.old_logprobs_T is None:
            names.append("sampling_logprobs")
    return names


def _mismatch_metrics(outputs: ForwardOutput, rows: Microbatch) -> TokenMetrics:
    """Distance of the current policy from the one that sampled; its KL is k3 of KL(behaviour || current)."""
    gap_T = outputs.logprobs_T.detach() - present(rows.sampling_logprobs_T)
    return {
        "logprob_gap:mean": gap_T.abs(),
        "logprob_gap:max": gap_T.abs(),
        "logprob_gap_kl:mean": gap_T.expm1() - gap_T,
    }


def _many_targets(loss: Loss, outputs: ForwardOutput, rows: Microbatch, spec: LossSpec) -> tuple[Tensor, TokenMetrics]:
    """The loss of each of K targets, [T, K]; only for losses that are made for it, with nothing added to them."""
    if not loss.many or spec.kl_coef or spec.entropy_coef:
        wanted = f"loss {spec.name}" if not loss.many else f"loss {spec.name} with kl_coef or entropy_coef"
        allowed = ", ".join(name for name in LOSSES.names() if LOSSES.get(name).many)
        raise UserError(
            f"{wanted}: the rows have targets [L, {rows.targets_T.shape[1]}]; give one target per position, or use one "
            f"of: {allowed} (kl_coef and entropy_coef 0)"
        )
    trained_TK = trained_tokens(rows)
    clean = outputs.logprobs_T.where(trained_TK, 0.0)
    nothing: dict[str, Any] = {f.name: None for f in fields(Microbatch) if f.default is None}
    loss_TK, metrics = loss.compute(ForwardOutput(clean), replace(rows, **nothing), params=spec.params)
    return loss_TK.where(trained_TK, 0.0), metrics


def compute_loss(outputs: ForwardOutput, rows: Microbatch, spec: LossSpec) -> tuple[Tensor, TokenMetrics]:
    """policy * correction * its scale + kl_coef * KL - entropy_coef * entropy of each token, [T], not yet weighted; and
    metrics.
    [T, K] for cross-entropy with K targets.

    Untrained tokens have loss 0 and gradient 0 whatever they hold. Metrics are detached [T] tensors, to be reduced
    over trained tokens: those of the loss; "entropy:mean"; "kl_reference:mean" (by spec.kl_estimator) when rows have a
    reference; "logprob_gap:*" when rows have behaviour log-probs; with a correction its mean weight and the part of the
    tokens at the cap or at 0.
    Raises UserError when a needed field is missing or an option does not apply.
    """
    loss = check_spec(spec)
    if rows.targets_T.ndim == 2:
        return _many_targets(loss, outputs, rows, spec)
    rows = _with_fields(rows, _needed_fields(loss, rows, spec), spec)
    if loss.kind == "critic" and outputs.values_T is None:
        raise UserError(f"loss {spec.name}: model without a value head; train it on a critic")
    if spec.entropy_coef != 0.0 and outputs.entropy_T is None:
        raise RuntimeError(
            f"loss {spec.name}: entropy_coef is {spec.entropy_coef}, but the forward pass gave no entropy"
        )
    raw = (outputs, rows)
    outputs, rows = sanitised(outputs, rows)
    metrics: TokenMetrics = {}
    correction_T = None
    if spec.correction != "none":
        if rows.old_logprobs_T is None:
            rows = replace(rows, old_logprobs_T=outputs.logprobs_T.detach())
        log_ratio_T = base_logprobs(rows) - present(rows.sampling_logprobs_T)
        correct = CORRECTIONS.get(spec.correction)
        correction_T = correct(log_ratio_T, rows, spec.correction_cap, spec.correction_low).detach()
        metrics["correction:mean"] = correction_T
        changed_T = (correction_T >= spec.correction_cap) | (correction_T <= spec.correction_low)
        metrics["correction_capped:mean"] = changed_T.to(correction_T.dtype)
        if spec.correction_scale != 1.0:
            correction_T = correction_T * spec.correction_scale
    if loss.ratio_mask and rows.ratio_mask_T is not None:  # its tokens count in a ratio without being trained
        wide = sanitised(*raw, present(raw[1].ratio_mask_T) != 0)
        old_logprobs_T = (
            wide[0].logprobs_T.detach() if correction_T is not None and raw[1].old_logprobs_T is None else None
        )
        own = (wide[0], wide[1] if old_logprobs_T is None else replace(wide[1], old_logprobs_T=old_logprobs_T))
    else:
        own = (outputs, rows)
    loss_T, own_metrics = loss.compute(*own, params=spec.params)
    metrics.update(own_metrics)
    if correction_T is not None:
        loss_T = loss_T * correction_T
    if loss.kind == "critic":
        return loss_T.where(trained_tokens(rows), 0.0), metrics
    if rows.reference_T is not None:
        base = (base_logprobs(rows),) if spec.kl_estimator in NEEDS_BASE else ()
        kl_T = KL_ESTIMATORS.get(spec.kl_estimator)(outputs.logprobs_T, rows.reference_T, *base)
        metrics["kl_reference:mean"] = kl_T.detach()
        if spec.kl_coef != 0.0:
            loss_T = loss_T + spec.kl_coef * kl_T
    if outputs.entropy_T is not None:
        metrics["entropy:mean"] = outputs.entropy_T.detach()
        if spec.entropy_coef != 0.0:
            loss_T = loss_T - spec.entropy_coef * outputs.entropy_T
    if rows.sampling_logprobs_T is not None:
        metrics.update(_mismatch_metrics(outputs, rows))
    return loss_T.where(trained_tokens(rows), 0.0), metrics
