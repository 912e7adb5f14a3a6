"""Policies for Gymnasium spaces: the modules in the box, and `ActorCritic`, which a strategy holds.

A policy is made by a registered function or class:

    @skyrl.register_policy("mine")
    class Mine(torch.nn.Module):
        def __init__(self, observation_space, action_space, *, width=64): ...
        def forward(self, observations): ...  # [B, *observation_space.shape] -> [B, P]

Observations are floats of the model's dtype, images (uint8) stay uint8. P is distributions.parameters_of(action_space).
A forward that returns (parameters [B, P], values [B]) is its own critic; one that returns parameters alone gets a
critic beside it (control.critic). A recurrent policy has `initial_state(n)` -> [n, S], and its forward takes
(observations, state) and returns (parameters, values, state).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from skyrl.hub.policies import POLICIES, register_policy
from skyrl.trainers.control.distributions import (
    BinaryActions,
    CategoricalActions,
    GaussianActions,
    distribution,
    parameters_of,
)
from skyrl.types import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}


def initialised(layer: Any, gain: float = 2.0**0.5) -> Any:
    """The layer, linear or convolution, with orthogonal weights times `gain`, and biases of 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def layers(sizes: Sequence[int], activation: str, gain: float) -> nn.Sequential:
    """Linear layers of these sizes with an activation between any two; orthogonal weights, those of the last one times
    `gain`, biases 0 (Engstrom et al. 2020, arXiv 2005.12729)."""
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"control.policy_options.activation={activation}: choose one of: {known}")
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        linear = initialised(nn.Linear(a, b), gain if last else 2.0**0.5)
        parts += [linear] if last else [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*parts)


@register_policy("mlp")
class MLP(nn.Module):
    """Fully connected layers over the flat observation: by default two of 64 with tanh, the network of Schulman et al.
    2017, arXiv 1707.06347. `gain`: of the last layer's weights; 1 where it makes a critic."""

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        gain: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = [int(np.prod(observation_space.shape)), *hidden, parameters_of(action_space)]
        self.net = layers(sizes, activation, gain)

    def forward(self, observations: Tensor) -> Tensor:
        """[B, *shape] -> [B, P]."""
        return self.net(observations.flatten(1).to(next(self.parameters()).dtype))


class KerasModule(nn.Module):
    """A built Keras model with weights that are numbered in the order in which its layers were made. Keras names them
    by a count of all layers of the process, and torch takes them in the order of these names (dense_10 before dense_9):
    a checkpoint could not be read, or be mixed up, where other models were made before. Raises UserError for a model
    that keeps more than trainable weights: what was sampled could not be computed again."""

    def __init__(self, model: Any, where: str) -> None:
        super().__init__()
        if kept := [one.path for one in model.non_trainable_variables]:
            raise UserError(f"{where}: keeps {kept[0]} beside trainable weights; leave Dropout, BatchNormalization out")
        self.call = model.__call__  # the model is no submodule, whose weights would have Keras's names
        self.weights = nn.ParameterList(one.value for one in model.trainable_variables)
        self.__dict__ |= {name: getattr(model, name) for name in ("initial_state", "sequence") if hasattr(model, name)}

    def forward(self, *inputs: Tensor) -> Any:
        """[B, *shape], and a state [B, S] where there is one, to what the model returns."""
        return self.call(*inputs)


class ActorCritic(nn.Module):
    """A policy, its critic, and the log standard deviations of its Gaussian: what is trained as one module.

    `critic` None: the policy returns values itself. A critic is a module [B, *shape] -> [B] or [B, 1].
    """

    def __init__(
        self, policy: Any, critic: nn.Module | None, space: Any, squash: bool = False, log_std: float = 0.0
    ) -> None:
        super().__init__()
        self.critic, self.space, self.squash, self.log_std = critic, space, squash, None
        self.policy: Any = policy
        if type(space).__name__ == "Box":
            self.log_std = nn.Parameter(torch.full((parameters_of(space),), log_std))

    @property
    def is_recurrent(self) -> bool:
        """Whether forward passes carry a state from one step to the next."""
        return hasattr(self.policy, "initial_state")

    def initial_state(self, n: int) -> Tensor | None:
        """The state [n, S] in which n episodes begin; None where there is none."""
        return self.policy.initial_state(n) if self.is_recurrent else None

    def act(self, observations: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(parameters [B, P], next state or None): a forward pass without the critic beside the policy."""
        parts = outputs(self.policy, observations, state)
        return parts[0], parts[2] if len(parts) > 2 else None

    def forward(self, observations: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(parameters [B, P], values [B]) of observations [B, *shape]."""
        parts = outputs(self.policy, observations, state)
        values = parts[1] if self.critic is None else self.critic(observations)
        return parts[0], values.reshape(len(observations))

    def distribution(self, parameters: Tensor) -> CategoricalActions | BinaryActions | GaussianActions:
        """The distribution over actions that these parameters [B, P] stand for."""
        return distribution(self.space, parameters, self.log_std, self.squash)


def outputs(policy: nn.Module, observations: Tensor, state: Tensor | None) -> tuple[Any, ...]:
    """What a policy returns, as a tuple in any case."""
    out = policy(observations) if state is None else policy(observations, state)
    return out if isinstance(out, tuple) else (out,)


def make_actor_critic(
    name: str,
    options: dict[str, Any],
    critic: str,
    observation_space: Any,
    action_space: Any,
    *,
    seed: int,
    **more: Any,
) -> ActorCritic:
    """The registered policy `name` with its options, and a critic beside it where it returns no values: that of
    `critic`, a policy too, or the policy's own kind. Weights follow from `seed` alone; `more` goes to ActorCritic.
    Raises UserError for options it does not take, and for a policy whose output does not fit the action space."""
    where, wanted = f"control.policy={name}", parameters_of(action_space)
    bounded = type(action_space).__name__ == "Box" and np.isfinite(action_space.high - action_space.low).all()
    if more.get("squash") and not bounded:
        raise UserError(f"control.squash=true: the action space {action_space} is no Box with bounds; leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy, beside = _make(name, options, observation_space, action_space, where), None
        example = torch.as_tensor(np.zeros((2, *observation_space.shape), observation_space.dtype))
        example = example if example.dtype == torch.uint8 else example.float()
        try:
            with torch.no_grad():
                parts = outputs(policy, example, getattr(policy, "initial_state", lambda n: None)(2))
        except Exception as error:  # of foreign code
            raise UserError(f"{where}: its forward, given {list(example.shape)}, raised: {error}") from error
        if list(parts[0].shape) != [2, wanted]:
            raise UserError(
                f"{where}: returns {list(parts[0].shape)} for 2 observations; the action space {action_space} needs "
                f"[2, {wanted}]"
            )
        if len(parts) == 1:
            name, options = (critic, {}) if critic else (name, options)
            one = Box(-np.inf, np.inf, (1,))  # a value is a policy's only number
            beside = _make(name, options, observation_space, one, f"control.critic={name}", gain=1.0)
            if (found := outputs(beside, example, None)[0]).numel() != 2:
                raise UserError(
                    f"control.critic={name}: returns {list(found.shape)} for 2 observations, but a value is a number; "
                    "give another (control.critic=mlp), or let the policy return (parameters, values)"
                )
            beside = _numbered(beside, f"control.critic={name}")
    return ActorCritic(_numbered(policy, where), beside, action_space, **more)


def _numbered(module: nn.Module, where: str) -> nn.Module:
    keras: Any = sys.modules.get("keras")
    return KerasModule(module, where) if keras is not None and isinstance(module, keras.layers.Layer) else module


def _make(name: str, options: dict[str, Any], observations: Any, actions: Any, where: str, **more: Any) -> nn.Module:
    """What is registered as `name` for these spaces; of `more` what it takes. Raises UserError."""
    thing: Any = POLICIES.get(name, where.partition("=")[0])
    parameters = list(inspect.signature(thing).parameters.values())
    if isinstance(thing, type) and not issubclass(thing, nn.Module) or len(parameters) < 2:
        raise UserError(f"{where}: is a language model; one for control takes (observation_space, action_space)")
    takes = [one.name for one in parameters[2:]]
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    if unknown := [key for key in options if key not in takes and not anything]:
        known = ", ".join(takes) or "none"
        raise UserError(f"control.policy_options.{unknown[0]}: {name} has no such option; its options are: {known}")
    given = {**options, **{k: v for k, v in more.items() if k in takes and k not in options}}
    try:
        made = thing(observations, actions, **given)
    except UserError:
        raise
    except Exception as error:  # of foreign code
        told = "; control.critic=mlp gives the policy another critic" if where.startswith("control.critic") else ""
        raise UserError(f"{where}: making it for {actions} raised {type(error).__name__}: {error}{told}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{where}: made a {type(made).__name__}; wanted a torch.nn.Module")
    return made
