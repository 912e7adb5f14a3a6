"""Per-token KL estimators and the coefficient that follows a target. Nothing here reduces or samples.

With x drawn from the policy pi and r = log pi(x) - log ref(x), E[k1] = E[k3] = KL(pi || ref), and k2 is close to it
when the policies are near (J. Schulman, Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html). That says
nothing about gradients. As a *term of the loss* the expected on-policy gradients are (Tang and Munos 2025,
arXiv 2506.09477; Liu et al. 2025, arXiv 2510.01555; tests/algorithms/test_kl.py checks them by enumeration):

    k1    0: nothing is held back, only noise is added. Use it as a reward (kl.placement=reward), where it is right.
    k2    the gradient of KL(pi || ref): the one to take for the reverse KL.
    k3    the gradient of KL(ref || pi): mass-covering; equal to k2 in first order around pi = ref.
    k1+, k3+, abs+   the value of k1, k3 or abs with the gradient of k2 (straight-through).
    k3_ratio         k3 weighted by pi / base, where `base` sampled: the gradient of KL(pi || ref) off-policy too.
    abs   of no divergence: the sign of r, an L1 pull.

All as losses are per-token terms: what a token does to the KL of later tokens is left out. k1 in the reward
with gamma 1 has it. Off-policy (several updates per batch) each is biased further: the expectation is over the policy
that sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from skyrl.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

KL_ESTIMATORS: Registry[Callable[..., Tensor]] = Registry("KL estimator")

NO_GRADIENT_IN_LOSS = frozenset({"k1"})
"""Estimators whose expected on-policy gradient is 0 as a loss term: refused with kl.placement=loss."""
NEEDS_BASE = frozenset({"k3_ratio"})
"""Estimators that take the log-probabilities of the policy that sampled (or the old one) besides."""


@KL_ESTIMATORS.register("k1")
def k1(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """log pi - log ref, [T] in nats: unbiased, high variance, may be negative. As a loss it regularises nothing.

    Source: J. Schulman, Approximating KL Divergence, 2020.
    """
    return logprobs_T - reference_T


@KL_ESTIMATORS.register("k2")
def k2(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, [T] in nats^2: biased value, but its gradient is that of KL(pi || ref) on-policy.

    Source: J. Schulman, Approximating KL Divergence, 2020; the gradient: Tang and Munos 2025, arXiv 2506.09477.
    """
    return 0.5 * (logprobs_T - reference_T).square()


@KL_ESTIMATORS.register("k3")
def k3(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi), [T] in nats: unbiased, never negative. Its gradient on-policy is KL(ref || pi)'s.

    exp(ref - pi) grows without bound where the policy has left the reference far behind.
    Source: J. Schulman, Approximating KL Divergence, 2020; in GRPO: Shao et al. 2024, arXiv 2402.03300, equation 4.
    """
    difference_T = reference_T - logprobs_T
    return difference_T.expm1() - difference_T


@KL_ESTIMATORS.register("abs")
def absolute(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """|log pi - log ref|, [T] in nats: no estimate of a divergence, a pull of constant strength towards the reference.

    Source: the penalty "abs" of TRL's first PPO trainer and of verl.
    """
    return (logprobs_T - reference_T).abs()


def _straight_through(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    value = KL_ESTIMATORS.get(name)

    def estimator(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
        slope_T = k2(logprobs_T, reference_T)
        return value(logprobs_T, reference_T).detach() + (slope_T - slope_T.detach())

    estimator.__doc__ = f"""The value of {name} with the gradient of k2, [T] in nats.

    Source: verl's {name}+ (straight-through); why k2: Tang and Munos 2025, arXiv 2506.09477.
    """
    estimator.__name__ = estimator.__qualname__ = f"{value.__name__}_straight_through"
    return KL_ESTIMATORS.register(f"{name}+")(estimator)


k1_straight_through, k3_straight_through, abs_straight_through = map(_straight_through, ("k1", "k3", "abs"))


@KL_ESTIMATORS.register("k3_ratio")
def k3_ratio(logprobs_T: Tensor, reference_T: Tensor, base_T: Tensor) -> Tensor:
    """(pi / base) * k3, [T] in nats, differentiated through the ratio: unbiased in value and gradient off-policy.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv 2512.02556, its unbiased KL estimate. Differs: the ratio is not
    capped; `base` is the policy before the update where it was recomputed, else the sampler's.
    """
    # Autograd's derivative is a difference of two numbers near ref / base: at pi = base = e^-17 and ref = 1 float32 has
    # no digit of it left. It is -(pi / base) log(ref / pi). Where the policies agree the ratio does not matter.
    gap_T, now_T = reference_T - logprobs_T.detach(), logprobs_T.detach()
    ratio_T = (now_T - base_T).where(gap_T != 0, 0.0).exp()
    far_T = (reference_T - base_T).exp() - ratio_T * (1.0 + gap_T)  # ratio 0 times k3 infinite would be NaN
    value_T = far_T.where(gap_T > 1.0, ratio_T * (gap_T.clamp(max=1.0).expm1() - gap_T))
    return value_T - ratio_T * gap_T * (logprobs_T - now_T)


class AdaptiveKL:
    """KL coefficient that is multiplied towards a target after each step.

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon: `horizon` episodes at the limit of the error
    move it by a factor of at most e^0.2 = 1.22. Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2 (their
    code's form with a horizon). Differs: `kl` and `target` are means per token, not sums per episode.
    The options' checks see to it that all three are above 0, and the horizon at least the episodes of a step: else the
    coefficient could change its sign.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        self.coef, self.target, self.horizon = float(coef), float(target), float(horizon)

    def update(self, kl: float, episodes: int) -> float:
        """The coefficient for the next step. `kl` and `episodes` are global numbers, equal on every rank.

        Raises RuntimeError when kl is not finite.
        """
        if not math.isfinite(kl):
            raise RuntimeError(f"adaptive KL: the measured KL is {kl}")
        assert 0 < episodes <= self.horizon and self.coef > 0 and self.target > 0
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * episodes / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; target and horizon come from the config."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        self.coef = float(state["coef"])
