"""Estimators against enumeration: expected values and, as losses, expected gradients; and the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch

from skyrl.algorithms.kl import KL_ESTIMATORS, NO_GRADIENT_IN_LOSS, AdaptiveKL
from skyrl.config.load import load_config
from skyrl.config.validation import check
from skyrl.types import UserError


def policies(seed: int = 0, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, generator=g, dtype=torch.float64) * scale).requires_grad_()
    reference = torch.log_softmax(torch.randn(6, generator=g, dtype=torch.float64) * scale, 0)
    return logits, reference


def kl(p_log: torch.Tensor, q_log: torch.Tensor) -> torch.Tensor:
    return (p_log.exp() * (p_log - q_log)).sum()


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])  # the others: test_formulas.py
def test_formula_and_gradient_per_token(name: str) -> None:
    lp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    value = KL_ESTIMATORS.get(name)(lp, ref)
    value.sum().backward()
    for t in range(3):
        gap = float(lp[t].detach() - ref[t])
        ratio = float(torch.exp(torch.tensor(-gap, dtype=torch.float64)))
        want = {"k1": (gap, 1.0), "k2": (gap**2 / 2, gap), "k3": (ratio - 1 + gap, 1 - ratio)}[name]
        assert float(value[t].detach()) == pytest.approx(want[0], rel=1e-12, abs=1e-15)
        assert float(lp.grad[t]) == pytest.approx(want[1], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_expected_values(seed: int) -> None:
    """k1 and k3 are unbiased for KL(pi || ref); k2 is near it for near policies."""
    logits, ref = policies(seed)
    lp = torch.log_softmax(logits, 0).detach()
    for name in ("k1", "k3"):
        assert float((lp.exp() * KL_ESTIMATORS.get(name)(lp, ref)).sum()) == pytest.approx(float(kl(lp, ref)))
    near = torch.log_softmax(lp + 0.01 * ref, 0)
    got = float((near.exp() * KL_ESTIMATORS.get("k2")(near, lp)).sum())
    assert got == pytest.approx(float(kl(near, lp)), rel=0.02)
    assert (KL_ESTIMATORS.get("k3")(lp, ref) >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_as_a_loss(seed: int) -> None:
    """What the module docstring claims: k1 nothing, k2 reverse KL, k3 forward KL; on-policy, so pi is detached."""
    logits, ref = policies(seed)
    want = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": torch.autograd.grad(kl(torch.log_softmax(logits, 0), ref), logits)[0],
        "k3": torch.autograd.grad(kl(ref, torch.log_softmax(logits, 0)), logits)[0],
    }
    for name in want:
        lp = torch.log_softmax(logits, 0)
        loss = (lp.detach().exp() * KL_ESTIMATORS.get(name)(lp, ref)).sum()
        (got,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-14)
        assert (name in NO_GRADIENT_IN_LOSS) == (not got.abs().gt(1e-12).any())


def test_adaptive_coefficient_equals_the_formula_and_resumes() -> None:
    controller = AdaptiveKL(coef=0.1, target=0.05, horizon=1000)
    coef = 0.1
    for measured, episodes in [(0.05, 64), (0.055, 64), (0.5, 64), (0.0, 128), (0.049, 1000)]:
        error = max(-0.2, min(0.2, measured / 0.05 - 1))
        coef *= 1 + error * episodes / 1000
        assert controller.update(measured, episodes) == pytest.approx(coef, rel=1e-15)
    again = AdaptiveKL(coef=0.1, target=0.05, horizon=1000)
    again.load_state_dict(controller.state_dict())
    assert again.update(0.2, 64) == controller.update(0.2, 64)


def test_adaptive_coefficient_settles_where_the_kl_meets_the_target() -> None:
    controller = AdaptiveKL(coef=1.0, target=0.02, horizon=100)
    for _ in range(2000):
        controller.update(kl=0.001 / controller.coef, episodes=20)  # the larger the coefficient, the smaller the KL
    assert 0.001 / controller.coef == pytest.approx(0.02, rel=1e-3)


def test_adaptive_coefficient_refuses_what_cannot_work() -> None:
    """A caller's bug; what a person gives is refused by the options' checks, which this asks too."""
    for one in ("coef=0", "target=-1", "horizon=100"):
        given = {"coef": "0.1", "target": "0.1", **dict([one.split("=")])}
        with pytest.raises(UserError, match=r"algorithm\.kl\."):
            check(load_config([f"algorithm.kl.{name}={value}" for name, value in given.items()]))
    with pytest.raises(AssertionError):
        AdaptiveKL(0.1, 0.1, 100).update(0.1, 101)
    with pytest.raises(RuntimeError, match="nan"):
        AdaptiveKL(0.1, 0.1, 100).update(float("nan"), 10)
