"""Corrections of the mismatch between the policy that sampled and the one that is trained: a weight per token, [T].

The ratio is old / behaviour: of each token; of a row, the product over its trained tokens (unbiased for sequences, its
spread grows with length); or their geometric mean (no length bias, not unbiased). Truncation holds it to [low, cap]; a
mask rejects what lies outside (weight 0), where a low of 0 means 1 / cap. Whether rejected tokens count in the mean of
the reduction is algorithm.loss.rejected: counted (default: rejecting more makes the step smaller) or dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from skyrl.registry import Registry
from skyrl.types import Microbatch

if TYPE_CHECKING:
    from torch import Tensor

CORRECTIONS: Registry[Callable[..., Tensor]] = Registry("correction")
MASKS = ("geometric_mask", "off_policy_sequence_mask", "sequence_mask", "token_mask")
"""Corrections that give tokens the weight 0."""


def trained_tokens(rows: Microbatch) -> Tensor:
    """[T] bool: tokens with a weight."""
    return rows.weights_T != 0


def sum_by_row(x_T: Tensor, rows: Microbatch) -> Tensor:
    """Sums [S] of x over the tokens of each row."""
    return x_T.new_zeros(len(rows.starts_S1) - 1).index_add(0, rows.row_T, x_T)


def correction_problem(name: str, cap: float, low: float) -> str:
    """What is wrong with the bounds of a correction, or ""."""
    if name in MASKS and cap <= 1:
        return (
            f"correction_cap={cap:g}: {name} keeps ratios between 1 / cap and cap, which leaves nothing to learn from "
            "at 1 or less; give more than 1 (default 2.0)"
        )
    if not cap >= 1:
        return f"correction_cap={cap:g}: below 1 it shrinks every weight, also where nothing differs; give 1 or more"
    if not 0 <= low < 1:
        return f"correction_low={low:g}: allowed are 0 (no bound) or more, and below 1, where nothing differs"
    return ""


def _product(log_ratio_T: Tensor, rows: Microbatch) -> Tensor:
    return sum_by_row(log_ratio_T.where(trained_tokens(rows), 0.0), rows).exp()[rows.row_T]


def _geometric(log_ratio_T: Tensor, rows: Microbatch) -> Tensor:
    count_S = sum_by_row(trained_tokens(rows).to(log_ratio_T.dtype), rows).clamp(min=1.0)
    return (sum_by_row(log_ratio_T.where(trained_tokens(rows), 0.0), rows) / count_S).exp()[rows.row_T]


def _truncate(ratio_T: Tensor, cap: float, low: float) -> Tensor:
    return ratio_T.clamp(low, cap) if low else ratio_T.clamp(max=cap)


def _mask(ratio_T: Tensor, cap: float, low: float) -> Tensor:
    return ratio_T.where((ratio_T >= (low or 1.0 / cap)) & (ratio_T <= cap), 0.0)


@CORRECTIONS.register("none")
def no_correction(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """Weight 1 everywhere: nothing is corrected."""
    return log_ratio_T.new_ones(log_ratio_T.shape)


@CORRECTIONS.register("token_truncate")
def token_truncate(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """Each token's ratio, held to [low, cap]. Source: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training (blog; "TIS"); truncated weights: Ionides 2008."""
    return _truncate(log_ratio_T.exp(), cap, low)


@CORRECTIONS.register("token_mask")
def token_mask(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """Each token's ratio where it lies in [low, cap], else 0. Source: IcePop (Ling team 2025, blog; Ring-1T report,
    arXiv 2510.18855). Differs: a low of 0 means 1 / cap."""
    return _mask(log_ratio_T.exp(), cap, low)


@CORRECTIONS.register("sequence_truncate")
def sequence_truncate(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """The row's product, held to [low, cap]. Source: Ionides 2008 (truncated importance sampling), of sequences; Liu,
    Li et al. 2025, When Speed Kills Stability (blog). Differs: a row is the sequence."""
    return _truncate(_product(log_ratio_T, rows), cap, low)


@CORRECTIONS.register("sequence_mask")
def sequence_mask(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """The row's product where it lies in [low, cap], else 0. Source: Liu, Li et al. 2025, When Speed Kills Stability
    (blog), masked importance sampling. Differs: a row is the sequence; a low of 0 means 1 / cap."""
    return _mask(_product(log_ratio_T, rows), cap, low)


@CORRECTIONS.register("geometric_truncate")
def geometric_truncate(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """The row's geometric mean, held to [low, cap]. Source: Zheng et al. 2025 (GSPO), arXiv 2507.18071, its ratio of a
    sequence, as a weight. Differs: a row is the sequence."""
    return _truncate(_geometric(log_ratio_T, rows), cap, low)


@CORRECTIONS.register("geometric_mask")
def geometric_mask(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """1 for rows whose geometric mean lies in [low, cap] (close to 1, such as 0.999 and 1.001), else 0: rejects, and
    does not weigh. Source: Liu, Li et al. 2025, When Speed Kills Stability (blog, part 3). Differs: a row is the
    sequence; a low of 0 means 1 / cap."""
    return (_mask(_geometric(log_ratio_T, rows), cap, low) > 0).to(log_ratio_T.dtype)


@CORRECTIONS.register("off_policy_sequence_mask")
def off_policy_sequence_mask(log_ratio_T: Tensor, rows: Microbatch, cap: float, low: float = 0.0) -> Tensor:
    """0 where the advantage is below 0 and the row's geometric mean below low, else 1. The paper's delta is -log low:
    0.5 is low = 0.61. Source: DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556, off-policy sequence masking.
    Differs: the policy is the one before the update if it was recomputed, else the current; low 0 means 1 / cap."""
    assert rows.advantages_T is not None
    far_T = _geometric(log_ratio_T, rows) < (low or 1.0 / cap)
    return (~((rows.advantages_T < 0) & far_T)).to(log_ratio_T.dtype)
