"""Distributions over the actions of a Gymnasium space, made from the numbers that a policy returns.

Actions are held as numbers [B, K] as they were drawn: indices of discrete parts, or a Gaussian's value before it is
clipped or squashed. `to_env` gives what the environment takes. Draws are by inversion, from uniform numbers that the
caller keys: no generator has a state, so ranks and restarts draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl.types import UserError

NODES, NODE_WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(24))
EDGE = 1e-7  # uniform numbers are held so far from 0 and 1, or a normal number could be infinite


def parts_of(space: Any) -> list[int]:
    """What a draw consists of: the sizes of discrete parts (2 for a binary one); [] for a Box. Raises UserError for a
    space that no policy here can act in."""
    kind = type(space).__name__
    if kind == "Discrete":
        return [int(space.n)]
    if kind == "MultiDiscrete":
        return [int(n) for n in space.nvec.reshape(-1)]
    if kind == "MultiBinary":
        return [2] * int(np.prod(space.shape))
    if kind == "Box" and np.issubdtype(space.dtype, np.floating):
        return []
    raise UserError(
        f"control.env_id: its action space is {space}; a policy acts in Discrete, MultiDiscrete, MultiBinary and Box "
        "of floats: register the environment with a wrapper that gives one of these"
    )


def parameters_of(space: Any) -> int:
    """P, how many numbers a policy returns for each observation: a logit of every choice (one for a binary part), or
    the mean of each number of a Box."""
    parts = parts_of(space)
    return len(parts) if type(space).__name__ == "MultiBinary" else sum(parts) or int(np.prod(space.shape))


def draws_of(space: Any) -> int:
    """K, how many numbers an action is, and how many uniform numbers a draw of it takes."""
    return len(parts_of(space)) or int(np.prod(space.shape))


def distribution(
    space: Any, parameters_BP: Tensor, log_std_K: Tensor | None, squash: bool = False
) -> CategoricalActions | BinaryActions | GaussianActions:
    """The distribution over actions of `space`. log_std_K: of a Box, the logarithm of its Gaussian's standard
    deviations; `squash`: through tanh into the bounds instead of clipped to them."""
    kind = type(space).__name__
    if kind == "MultiBinary":
        return BinaryActions(parameters_BP)
    if kind != "Box":
        return CategoricalActions(parameters_BP, parts_of(space))
    assert log_std_K is not None
    return GaussianActions(parameters_BP, log_std_K, space if squash else None)


class CategoricalActions:
    """Independent choices among `parts`; logits [B, sum of parts]."""

    def __init__(self, logits_BP: Tensor, parts: Sequence[int]) -> None:
        self.logps = [part.log_softmax(-1) for part in logits_BP.split(list(parts), -1)]

    def sample(self, uniform_BK: Tensor) -> Tensor:
        """Indices [B, K], each the first whose cumulative probability is above its uniform number."""
        pairs = zip(self.logps, uniform_BK.unbind(-1), strict=True)
        chosen = [(p.exp().cumsum(-1) <= u[:, None]).sum(-1).clamp(max=p.shape[-1] - 1) for p, u in pairs]
        return torch.stack(chosen, -1).to(self.logps[0].dtype)

    def mode(self) -> Tensor:
        """The likeliest indices [B, K]; the first of equals."""
        return torch.stack([logp.argmax(-1) for logp in self.logps], -1).to(self.logps[0].dtype)

    def log_prob(self, actions_BK: Tensor) -> Tensor:
        """Log-probabilities of whole actions in nats, [B]."""
        pairs = zip(self.logps, actions_BK.long().unbind(-1), strict=True)
        return torch.stack([logp.gather(-1, index[:, None])[:, 0] for logp, index in pairs]).sum(0)

    def entropy(self) -> Tensor:
        """Entropies in nats, [B]: the sum of the parts'."""
        return torch.stack([-(logp.exp() * logp).sum(-1) for logp in self.logps]).sum(0)


class BinaryActions(CategoricalActions):
    """Independent bits; logits [B, K] of 1 against 0."""

    def __init__(self, logits_BK: Tensor) -> None:
        pairs = torch.stack([torch.zeros_like(logits_BK), logits_BK], -1).flatten(1)
        super().__init__(pairs, [2] * logits_BK.shape[-1])


class GaussianActions:
    """Independent normal numbers; means [B, K], log_std [K]. With `box` their tanh, scaled into its bounds, is the
    action, and log-probabilities are of that: log N(x) - log d(action)/dx (Haarnoja et al. 2018, arXiv 1801.01290,
    appendix C). Without, the action is the number itself, and the environment gets it clipped: log-probabilities are
    those of the unclipped number, as usual for PPO."""

    def __init__(self, mean_BK: Tensor, log_std_K: Tensor, box: Any = None) -> None:
        self.mean, self.log_std, self.scale = mean_BK, log_std_K.expand_as(mean_BK), None
        if box is not None:
            half = torch.as_tensor((box.high.astype(np.float64) - box.low) / 2).reshape(-1)
            self.scale = half.log().to(mean_BK)

    def sample(self, uniform_BK: Tensor) -> Tensor:
        """Numbers [B, K] before clipping or squashing."""
        normal = torch.special.ndtri(uniform_BK.double().clamp(EDGE, 1.0 - EDGE)).to(self.mean)
        return self.mean + self.log_std.exp() * normal

    def mode(self) -> Tensor:
        """The means [B, K]. (Squashed, their image is the median of the action, which is what is played.)"""
        return self.mean

    def log_prob(self, actions_BK: Tensor) -> Tensor:
        """Log-densities of whole actions in nats, [B]."""
        z = (actions_BK - self.mean) * (-self.log_std).exp()
        each = -0.5 * (z.square() + math.log(2 * math.pi)) - self.log_std
        return (each if self.scale is None else each - log_slope(actions_BK) - self.scale).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropies in nats, [B]. Squashed ones have no closed form: the mean of the slope's logarithm is
        by Gauss-Hermite quadrature with 24 nodes."""
        each = self.log_std + 0.5 * (1.0 + math.log(2 * math.pi))
        if self.scale is not None:
            nodes, weights = NODES.to(self.mean), NODE_WEIGHTS.to(self.mean) / math.sqrt(2 * math.pi)
            slopes = log_slope(self.mean[..., None] + self.log_std.exp()[..., None] * nodes)
            each = each + (slopes * weights).sum(-1) + self.scale
        return each.sum(-1)


def log_slope(x: Tensor) -> Tensor:
    """log(1 - tanh(x)^2), which underflows written so."""
    return 2.0 * (math.log(2.0) - x - torch.nn.functional.softplus(-2.0 * x))


def to_env(space: Any, actions_BK: Tensor, squash: bool = False) -> np.ndarray:
    """What the environments are given for B actions: of shape [B, *space.shape] and the space's dtype."""
    raw = actions_BK.cpu().numpy()
    if type(space).__name__ == "Box":
        raw = raw.reshape(-1, *space.shape)
        if squash:
            raw = space.low + (np.tanh(raw) + 1.0) * (space.high.astype(np.float64) - space.low) / 2
        return np.clip(raw, space.low, space.high).astype(space.dtype)
    start = np.reshape(getattr(space, "start", 0), -1)
    return (raw.astype(np.int64) + start).reshape(-1, *space.shape).astype(space.dtype)
