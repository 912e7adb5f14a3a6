"""The policy `recurrent`: a GRU over what an encoder sees, and the replay of stored sequences through any policy that
keeps a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skyrl.trainers.control.cnn import ImageEncoder
from skyrl.trainers.control.distributions import parameters_of
from skyrl.trainers.control.policies import initialised, register_policy


@register_policy("recurrent")
class Recurrent(nn.Module):
    """An encoder (convolutions for images, one layer for vectors), a GRU cell, and policy and value on its state, all
    `hidden` wide."""

    def __init__(self, observation_space: Any, action_space: Any, *, hidden: int = 64) -> None:
        super().__init__()
        shape = tuple(observation_space.shape)
        size = int(torch.Size(shape).numel())
        flat = nn.Sequential(nn.Flatten(), initialised(nn.Linear(size, hidden)), nn.Tanh())
        self.encoder: nn.Module = flat if len(shape) < 2 else ImageEncoder(shape, hidden)
        self.cell = nn.GRUCell(hidden, hidden)
        for name, parameter in self.cell.named_parameters():
            nn.init.orthogonal_(parameter) if name.startswith("weight") else nn.init.zeros_(parameter)
        self.policy = initialised(nn.Linear(hidden, parameters_of(action_space)), 0.01)
        self.value = initialised(nn.Linear(hidden, 1), 1.0)

    def initial_state(self, n: int) -> Tensor:
        """The state [n, S] in which an episode begins: zeros."""
        return self.policy.weight.new_zeros(n, self.cell.hidden_size)

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([B, *shape], [B, S]) to (action parameters [B, P], values [B], next state [B, S])."""
        return self._step(self.encoder(observations), state)

    def _step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.cell(features, state)
        return self.policy(state), self.value(state)[:, 0], state

    def sequence(self, observations: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """What `replay` returns, with one call of the encoder for all steps."""
        steps, count = observations.shape[:2]
        features = self.encoder(observations.flatten(0, 1)).view(steps, count, -1)
        return _steps(self, self._step, features, state, starts)


def replay(module: nn.Module, observations: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The training pass of a policy that keeps a state, over whole sequences of T steps in N environments.

    observations [T, N, *shape]; state [N, S]: the stored one before the first step, without a gradient; starts [T, N]:
    whether an episode begins at that step, where the state is `initial_state` again, as it was in sampling. Returns
    action parameters [T, N, P] and values [T, N]. Gradients go back through all T steps and no further. A module with a
    method `sequence` of these arguments does it itself.
    """
    whole: Any = getattr(module, "sequence", None)
    if whole is not None:
        return whole(observations, state, starts)
    return _steps(module, module, observations, state, starts)


def _steps(module: Any, step: Any, inputs: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    fresh = module.initial_state(state.shape[0])
    found = []
    for one, start in zip(inputs, starts, strict=True):
        parameters, values, state = step(one, torch.where(start[:, None], fresh, state))
        found.append((parameters, values))
    return torch.stack([one for one, _ in found]), torch.stack([one for _, one in found])
