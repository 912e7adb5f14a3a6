"""What a run in Gymnasium environments owns: the policy under a strategy, its environments, and their statistics."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from skyrl.config.load import from_dict, to_dict
from skyrl.config.schema import RunConfig
from skyrl.distributed.collectives import all_reduce_sum, on_leader
from skyrl.distributed.init import World
from skyrl.engine import DTYPES
from skyrl.files import write_atomic
from skyrl.model import Model, ModelSpec
from skyrl.planner.plan import Plan, make_spec, make_value_spec
from skyrl.strategies.replicated import ReplicatedStrategy
from skyrl.trainers.control.distributions import draws_of, to_env
from skyrl.trainers.control.environments import LONGEST, check_numbers, make_envs
from skyrl.trainers.control.normalize import RunningMoments
from skyrl.trainers.control.policies import make_actor_critic
from skyrl.types import UserError

POLICY_FILE = "policy.pt"


class ControlPolicy:
    """A policy that acts: the module, the running statistics of what it reads, and the options of both."""

    def __init__(self, cfg: RunConfig, envs: VectorEnv, device: torch.device, dtype: torch.dtype) -> None:
        control = cfg.control
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.observation_space: Any = envs.single_observation_space
        self.action_space: Any = envs.single_action_space
        if control.normalize_observations and self.observation_space.dtype == np.uint8:
            raise UserError(
                "control.normalize_observations=true: observations are images; policies scale them themselves"
            )
        self.module = make_actor_critic(
            control.policy,
            dict(control.policy_options),
            control.critic,
            self.observation_space,
            self.action_space,
            seed=cfg.seed,
            squash=control.squash,
            log_std=math.log(control.initial_std),
        ).to(device, dtype)
        self.observation_moments = RunningMoments(self.observation_space.shape or ())

    def tensor(self, observations: np.ndarray) -> Tensor:
        """Observations [N, *shape] as the policy reads them: normalised where the run does that, of the model's dtype;
        images stay uint8."""
        if self.cfg.control.normalize_observations:
            observations = self.observation_moments.normalize(observations)
        found = torch.from_numpy(np.ascontiguousarray(observations)).to(self.device)
        return found if found.dtype == torch.uint8 else found.to(self.dtype)

    def act(self, observations: np.ndarray, state: Tensor | None) -> tuple[np.ndarray, Tensor | None]:
        """The likeliest actions for observations [N, *shape], as environments take them, and the next state."""
        with torch.no_grad():
            parameters, state = self.module.act(self.tensor(observations), state)
            actions = self.module.distribution(parameters).mode()
        return to_env(self.action_space, actions, self.cfg.control.squash), state

    def player(self) -> Callable[[Any], Any]:
        """A function from an observation to the likeliest action, for one episode: it keeps the state of a policy that
        has one."""
        state = self.module.initial_state(1)

        def play(observation: Any) -> Any:
            nonlocal state
            actions, state = self.act(np.asarray(observation)[None], state)
            return actions[0]

        return play


class ControlEngine(ControlPolicy):
    """Stands for `skyrl.engine.Engine` in a run: state, export and replicas of one model, "policy", which is whole on
    every rank; and this rank's part of the environments, each of which is where its last episode has come to.

    A checkpoint has the statistics, and of each environment the number of its episode and the actions since it began:
    a restart plays these again. They are those of the last `keep`, so that a step that is taken back leaves no trace.
    """

    def __init__(self, cfg: RunConfig, world: World, plan: Plan) -> None:
        control, self.world = cfg.control, world
        self.places = world.deal(range(control.n_envs))
        self.envs: Any = make_envs(cfg, self.places)
        super().__init__(cfg, self.envs, world.device, DTYPES[plan.dtype])
        if self.module.is_recurrent and control.minibatch_size % control.n_steps:
            raise UserError(
                f"control.minibatch_size={control.minibatch_size}: policy {control.policy} learns from whole "
                f"sequences; give a multiple of control.n_steps={control.n_steps}"
            )
        strategy = ReplicatedStrategy(self.module, world, optimizer=cfg.optim.name)
        self.models = {"policy": Model("policy", ModelSpec(), strategy, world)}
        self.specs = make_spec(cfg.algorithm, 1.0), make_value_spec(cfg.algorithm.critic)
        self.return_moments = RunningMoments(())
        self.discounted = np.zeros(len(self.places))  # sum of rewards of the episode under way, for their spread
        self.hidden: Tensor | None = self.module.initial_state(len(self.places))
        self._reset({})

    @property
    def all_sum(self) -> Callable[[np.ndarray], np.ndarray]:
        """The sum over ranks."""
        return partial(all_reduce_sum, self.world)

    def _reset(self, progress: dict[int, Any]) -> None:
        self.observations, _ = self.envs.reset(options={"progress": progress} if progress else None)
        check_numbers("an observation", self.observations, self.places, self.cfg.control.env_id)
        self.starts = np.array([not progress.get(place, (0, ()))[1] for place in self.places])
        self.keep()

    # ---- state: as Engine's ----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """From here on a checkpoint has the environments and statistics as they are now. Local."""
        hidden = self.hidden.clone() if self.hidden is not None else torch.zeros(len(self.places), 0)
        progress = self.envs.call("progress")
        self._kept = (self._statistics(), progress, self.discounted.copy(), hidden.cpu().double().numpy())

    def _statistics(self) -> dict[str, Tensor]:
        parts = {"observations": self.observation_moments, "returns": self.return_moments}
        found = {f"{name}_{k}": torch.tensor(v) for name, one in parts.items() for k, v in one.state().items()}
        text = f"{self.cfg.control.env_id} {self.observation_space.shape} {self.action_space}"
        digest = hashlib.sha256(text.encode()).digest()[:8]
        return {**found, "environment": torch.frombuffer(bytearray(digest), dtype=torch.uint8)}

    def _episodes(self) -> dict[str, Tensor]:
        """Of all environments of the run: numbers of episodes, actions since they began (as many as are kept),
        discounted rewards, states of a recurrent policy. Collective."""
        _, progress, discounted, hidden = self._kept
        control, count = self.cfg.control, self.cfg.control.n_envs
        limit = control.max_episode_steps or gymnasium.spec(control.env_id).max_episode_steps or LONGEST
        found = {"episode": np.zeros(count), "length": np.zeros(count), "discounted": np.zeros(count)}
        found["hidden"] = np.zeros((count, hidden.shape[1]))
        found["actions"] = np.zeros((count, limit, draws_of(self.action_space)))
        for i, place in enumerate(self.places):
            episode, taken = progress[i]
            found["episode"][place], found["length"][place] = episode, len(taken)
            found["discounted"][place], found["hidden"][place] = discounted[i], hidden[i]
            for t, action in enumerate(taken[:limit]):
                found["actions"][place, t] = np.reshape(action, -1)
        return {name: torch.from_numpy(self.all_sum(part)) for name, part in found.items()}

    def state(self, *, optimizer: bool | None = None) -> dict[str, Any]:
        """Tensors by part and name, for a checkpoint; with `optimizer` said, for a run that begins from this one,
        without the episodes under way. Collective."""
        model = self.models["policy"].state(optimizer=optimizer is not False)
        found = {"policy": model, "statistics": dict(self._kept[0])}
        return found if optimizer is not None else {**found, "episodes": self._episodes()}

    def load_state(self, state: dict[str, Any], *, optimizer: bool | None = None) -> None:
        """Takes back what `state` gave, after a checkpoint filled it. Raises UserError for the statistics of another
        environment."""
        statistics, control = state["statistics"], self.cfg.control
        other = not torch.equal(statistics["environment"], self._statistics()["environment"])
        if other and (control.normalize_observations or control.normalize_rewards):
            raise UserError(
                f"control.env_id={control.env_id}: the checkpoint has the running statistics of another environment; "
                "set control.normalize_observations=false and control.normalize_rewards=false, or begin without it"
            )
        self.models["policy"].load_state(state["policy"], optimizer=optimizer is not False)
        for name, one in (("observations", self.observation_moments), ("returns", self.return_moments)):
            one.load({key: statistics[f"{name}_{key}"].numpy() for key in ("count", "mean", "squares")})
        if "episodes" not in state:
            return self.keep()
        part = {key: value.numpy() for key, value in state["episodes"].items()}
        progress: dict[int, Any] = {}
        self.discounted = part["discounted"][self.places]
        for i, place in enumerate(self.places):
            episode, length = int(part["episode"][place]), int(part["length"][place])
            if length <= part["actions"].shape[1] and control.preprocess == "none":
                taken = part["actions"][place, :length].reshape(-1, *self.action_space.shape)
                progress[place] = (episode, list(taken.astype(self.action_space.dtype)))
            else:  # too long, or a life of a game that began before: the next one begins
                progress[place], self.discounted[i] = (episode + 1, ()), 0.0
        if self.hidden is not None:
            self.hidden = torch.from_numpy(part["hidden"][self.places]).to(self.hidden)
        self._reset(progress)

    def check_replicas(self, model: str = "policy") -> None:
        """Raises RunError unless all ranks hold the same weights. Collective."""
        self.models[model].check_replicas()

    def export(self, model: str, folder: Path, about: str = "") -> None:
        """Writes weights, statistics and options to policy.pt in `folder`, by rank 0, for `load_policy`. Collective."""
        weights = self.models[model].strategy.full_state_dict(self.dtype)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            torch.save({"weights": weights, "statistics": self._kept[0], "config": to_dict(self.cfg)}, file)
            write_atomic(folder / POLICY_FILE, file.getvalue())

        on_leader(self.world, write)


def load_policy(folder: str | Path) -> Callable[[Any], Any]:
    """A function from one observation of the environment to the likeliest action, of a run's export. The state of a
    recurrent policy goes on from call to call. Raises UserError for a folder without one."""
    path = Path(folder) / POLICY_FILE
    if not path.is_file():
        raise UserError(f"{path}: is not there; give the folder `export` of a run with trainer=control")
    told = torch.load(path, weights_only=True)
    cfg, weights, prefix = from_dict(told["config"]), told["weights"], "observations_"
    policy = ControlPolicy(cfg, make_envs(cfg, [0], "eval"), torch.device("cpu"), next(iter(weights.values())).dtype)
    policy.module.load_state_dict(weights)
    statistics = {key.removeprefix(prefix): v for key, v in told["statistics"].items() if key.startswith(prefix)}
    policy.observation_moments.load({key: value.numpy() for key, value in statistics.items()})
    return policy.player()
