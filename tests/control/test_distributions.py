"""Actions against torch.distributions and scipy: log-probabilities, entropies, and that draws follow them."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import distributions as td

from skyrl.types import UserError

spaces = pytest.importorskip("gymnasium.spaces", reason="the extra control is not installed")

from skyrl.trainers.control.distributions import (  # noqa: E402
    distribution,
    draws_of,
    parameters_of,
    to_env,
)

F64 = {"dtype": torch.float64}
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32))


def grid(count, width):
    """Uniform numbers that fill the unit cube evenly: every width-th part in an order of its own."""
    rng = np.random.default_rng(0)
    even = (np.arange(count) + 0.5) / count
    return torch.tensor(np.stack([rng.permutation(even) for _ in range(width)], 1))


def categorical(space):
    """The reference over one observation's logits, part by part."""
    sizes = [space.n] if isinstance(space, spaces.Discrete) else space.nvec.reshape(-1).tolist()
    return lambda logits: [td.Categorical(logits=part) for part in logits.split(sizes, -1)]


@pytest.mark.parametrize("space", [spaces.Discrete(5, start=-2), spaces.MultiDiscrete([3, 2, 4])])
def test_choices(space):
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, parameters_of(space), **F64)
    ours, reference = distribution(space, logits, None), categorical(space)(logits)
    assert torch.allclose(ours.entropy(), sum(part.entropy() for part in reference))
    uniform = torch.rand(7, draws_of(space), **F64)
    actions = ours.sample(uniform)
    wanted = sum(part.log_prob(actions[:, k]) for k, part in enumerate(reference))
    assert torch.allclose(ours.log_prob(actions), wanted)
    assert torch.equal(ours.mode(), torch.stack([part.probs.argmax(-1) for part in reference], -1).double())
    given = to_env(space, actions)
    assert all(space.contains(one) for one in (given if given.ndim > 1 else [space.dtype.type(x) for x in given]))
    many = distribution(space, logits[:1].expand(4000, -1), None).sample(grid(4000, draws_of(space)))
    for k, part in enumerate(reference):
        shares = torch.bincount(many[:, k].long(), minlength=part.probs.shape[-1]) / 4000
        assert (shares - part.probs[0]).abs().max() < 1e-3


def test_bits():
    space = spaces.MultiBinary([2, 3])
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, parameters_of(space), **F64)
    ours, reference = distribution(space, logits, None), td.Independent(td.Bernoulli(logits=logits), 1)
    actions = ours.sample(torch.rand(4, draws_of(space), **F64))
    assert torch.allclose(ours.log_prob(actions), reference.log_prob(actions))
    assert torch.allclose(ours.entropy(), reference.entropy())
    assert torch.equal(ours.mode(), (logits > 0).double())
    assert all(space.contains(one) for one in to_env(space, actions))
    many = distribution(space, logits[:1].expand(4000, -1), None).sample(grid(4000, 6))
    assert (many.mean(0) - logits[0].sigmoid()).abs().max() < 1e-3


def test_gaussian():
    torch.manual_seed(0)
    mean, log_std = torch.randn(5, 2, **F64), torch.tensor([-1.0, 0.5], **F64)
    ours, reference = distribution(BOX, mean, log_std), td.Independent(td.Normal(mean, log_std.exp()), 1)
    uniform = torch.rand(5, 2, **F64)
    actions = ours.sample(uniform)
    assert np.allclose(actions, stats.norm.ppf(uniform, mean, log_std.exp()))
    assert torch.allclose(ours.log_prob(actions), reference.log_prob(actions))
    assert torch.allclose(ours.entropy(), reference.entropy()) and torch.equal(ours.mode(), mean)
    assert np.allclose(to_env(BOX, actions), actions.clamp(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 3.0])))


def squashed(mean, log_std):
    """torch's own transformed distribution of the action that the environment is given."""
    low, high = torch.tensor(BOX.low, **F64), torch.tensor(BOX.high, **F64)
    parts = [td.TanhTransform(), td.AffineTransform((low + high) / 2, (high - low) / 2)]
    return td.TransformedDistribution(td.Normal(mean, log_std.exp()), parts)


def test_squashed_gaussian():
    torch.manual_seed(0)
    mean, log_std = torch.randn(5, 2, **F64), torch.tensor([-1.0, 0.5], **F64)
    ours, reference = distribution(BOX, mean, log_std, squash=True), squashed(mean, log_std)
    actions = ours.sample(torch.rand(5, 2, **F64))
    played = reference.transforms[1](reference.transforms[0](actions))
    assert np.allclose(to_env(BOX, actions, squash=True), played)
    assert torch.allclose(ours.log_prob(actions), reference.log_prob(played).sum(-1))
    assert all(BOX.contains(one) for one in to_env(BOX, 50 * torch.randn(20, 2), squash=True))


def test_squashed_far_out_has_a_finite_log_density_and_gradient():
    mean = torch.full((1, 2), 30.0, requires_grad=True)
    found = distribution(BOX, mean, torch.zeros(2), squash=True).log_prob(torch.full((1, 2), 29.0))
    found.backward()
    # log(1 - tanh(29)^2) = log 4 - 58, and the width of each side is 3
    wanted = 2 * (stats.norm.logpdf(-1.0) - (np.log(4) - 58) - np.log(1.5))
    assert found.item() == pytest.approx(wanted, rel=1e-6) and torch.isfinite(mean.grad).all()


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.7)])
def test_entropy_of_a_squashed_gaussian(mean, log_std):
    """-E log p by numerical integration over the Gaussian's number."""
    means, log_stds = torch.full((1, 2), mean, **F64), torch.full((2,), log_std, **F64)
    reference = squashed(means, log_stds)

    def integrand(x):
        action = reference.transforms[1](reference.transforms[0](torch.full((1, 2), x, **F64)))
        return -reference.log_prob(action)[0, 0].item() * stats.norm.pdf(x, mean, np.exp(log_std))

    spread = np.exp(log_std)
    wanted, _ = integrate.quad(integrand, mean - 9 * spread, mean + 9 * spread, epsabs=1e-8)
    ours = distribution(BOX, means, log_stds, squash=True).entropy()
    assert ours.item() == pytest.approx(2 * wanted, abs=2e-3)


@pytest.mark.parametrize(
    "space", [spaces.Tuple([spaces.Discrete(2)]), spaces.Box(0, 9, (2,), np.int32), spaces.Text(3)]
)
def test_spaces_that_nothing_acts_in(space):
    with pytest.raises(UserError, match="a policy acts in Discrete, MultiDiscrete, MultiBinary and Box of floats"):
        parameters_of(space)
