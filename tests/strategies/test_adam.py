"""Which steps may be made without a look at their result."""

from dataclasses import replace

import pytest
import torch

from skyrl.distributed.init import World
from skyrl.strategies.adam import check_factors, surely_finite
from skyrl.strategies.replicated import ReplicatedStrategy
from skyrl.types import AdamParams, RunError

PLAIN = AdamParams(lr=1e-3)


def strategy(weight, gradient, dtype=torch.float32, tensors=1):
    """A model of one weight (or more), with a gradient pending."""
    module = torch.nn.ParameterList([torch.tensor([weight], dtype=dtype) for _ in range(tensors)])
    made = ReplicatedStrategy(module, World(0, 1, 0, torch.device("cpu")))
    if gradient:
        made.backward(sum((p * gradient).sum() for p in module))
    return made


@pytest.mark.parametrize(
    ("adam", "weight", "gradient"),
    [
        (replace(PLAIN, eps=0.0), 1.0, 0.0),  # 0 / 0
        (replace(PLAIN, eps=0.0), 1.0, 1e-30),  # its square is 0
        (replace(PLAIN, eps=1e-50), 1.0, 0.0),  # 0 in float32
        (replace(PLAIN, eps=1e39), 1.0, 1.0),
        (replace(PLAIN, lr=1e39), 1.0, 1.0),
        (replace(PLAIN, lr=1e38, weight_decay=10.0), 1.0, 1.0),
        (replace(PLAIN, lr=1.0, weight_decay=3e38), 2.0, 1.0),
        (replace(PLAIN, lr=3e37), 3.4e38, -1.0),
        (replace(PLAIN, lr=3e38, beta1=0.0), -3e38, 1.0),
        (PLAIN, 1.0, 1e25),  # the square overflows
        (replace(PLAIN, beta2=0.0), 1.0, 1e20),
    ],
)
def test_an_update_that_is_not_finite_is_refused_and_leaves_no_trace(adam, weight, gradient):
    made = strategy(weight, gradient)
    before = {key: one.clone() for key, one in made.state_dict(optimizer=True)["weights"].items()}
    with pytest.raises(RunError, match="not finite .*; no weight was changed; "):
        made.optim_step(adam)
    state = made.state_dict(optimizer=True)
    assert torch.equal(state["weights"]["0"], before["0"]) and float(state["step"]) == 0
    assert not state["exp_avg"]["0"].any() and not state["exp_avg_sq"]["0"].any()
    made.clear_gradient()
    assert made.optim_step(PLAIN) == {"grad_norm:mean": 0.0}


def test_rounding_to_bfloat16_counts_too():
    made = strategy(3.38e38, -1.0, torch.bfloat16)
    with pytest.raises(RunError, match="the update is not finite"):
        made.optim_step(replace(PLAIN, lr=2.4e36))


@pytest.mark.parametrize("gradient", [1.0, -1e-8, 1e15])
def test_steps_with_eps_0_and_a_gradient_everywhere_are_made(gradient):
    """Also where the flat buffer has room between two tensors, which no gradient reaches."""
    made = strategy(1.0, gradient, tensors=2)
    for _ in range(2):
        made.backward(sum((p * gradient).sum() for p in made.module))
        made.optim_step(replace(PLAIN, eps=0.0))
        assert torch.isfinite(made.flat).all()
    assert float(made.module[1]) == pytest.approx(1.0 - 2e-3 * (1 if gradient > 0 else -1), rel=1e-3)


def test_usual_steps_are_known_to_be_finite():
    for adam in (PLAIN, replace(PLAIN, lr=1.0, weight_decay=0.1), replace(PLAIN, eps=1e-15), replace(PLAIN, lr=0.0)):
        check_factors(adam, 1.0)
        assert surely_finite(adam, 1e4, 1.0, [1e3, 1e2, 1e4])
    for sizes in ([float("nan"), 1.0, 1.0], [1.0, float("inf"), 1.0], [1e36, 1.0, 1.0], [1.0, 1.0, 1e36]):
        assert not surely_finite(PLAIN, 1.0, 1.0, sizes)
    assert not surely_finite(PLAIN, 1e19, 1.0, [1.0, 1.0, 1.0])
    assert surely_finite(replace(PLAIN, grad_clip_norm=1.0), 1e19, 1.0, [1.0, 1.0, 1.0])
