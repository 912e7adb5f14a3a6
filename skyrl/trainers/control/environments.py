"""Gymnasium environments in vectors, whose every episode is keyed: what happens in it follows from the run's seed, the
environment's place among all of the run, the number of its episode, and the actions; never from ranks or restarts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from skyrl.config.schema import RunConfig
from skyrl.envs.guard import describe_error
from skyrl.planner.control import EXTRA, find_environment
from skyrl.rollout import draw_seed
from skyrl.types import UserError

LONGEST = 10_000  # steps of an episode that a checkpoint can bring back, where the environment has no limit itself
FLAT = (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)  # observations that become one-hot


class KeyedEnv(gym.Wrapper):  # type: ignore[misc]
    """Seeds each reset by `key` and the number of the episode, and remembers the actions of the episode under way. A
    reset with options {"progress": {place: (episode, actions)}} plays them again, which brings that episode back.

    The info of an episode's last step has "episode_return" and "episode_length", and nothing else. Raises UserError
    where the environment raises, or observes something of another shape than its space says.
    """

    def __init__(self, env: Any, key: tuple[Any, ...]) -> None:
        super().__init__(env)
        self.key, self.episode, self.taken, self.total = key, -1, list[np.ndarray](), 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of the next episode, or where `options` say, the one after these actions."""
        given = dict(options or {})
        self.episode, taken = given.pop("progress", {}).get(self.key[-1], (self.episode + 1, ()))
        self.taken, self.total = [], 0.0
        observation, _ = self._call("reset", seed=draw_seed(*self.key, self.episode) >> 32, options=given or None)
        for action in taken:
            observation, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:  # one that its seed and actions do not determine: the next begins
                return self.reset()
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As the environment's. Of its info nothing is passed on, which a vector would put together key by key."""
        self.taken.append(np.array(action))
        observation, reward, terminated, truncated, info = self._call("step", action)
        self.total += float(reward)
        told: dict[str, Any] = {}
        if (terminated or truncated) and not info.get("life_lost"):
            whole = info.get("episode") or {"r": self.total, "l": len(self.taken)}  # a game's: not of its last life
            told = {"episode_return": float(whole["r"]), "episode_length": float(whole["l"])}
        return observation, float(reward), terminated, truncated, told

    def _call(self, name: str, *given: Any, **more: Any) -> Any:
        where = f"control.env_id={self.spec.id if self.spec else self.env}: {name}() of environment {self.key[-1]}"
        try:
            out = getattr(self.env, name)(*given, **more)
        except Exception as error:  # of foreign code
            raise UserError(f"{where} raised {describe_error(error)}") from error
        if (shape := np.shape(out[0])) != self.observation_space.shape:
            raise UserError(
                f"{where} observed an array of shape {shape}; its space says {self.observation_space.shape}"
            )
        return out

    def progress(self) -> tuple[int, list[np.ndarray]]:
        """The episode under way, and its actions so far."""
        return self.episode, list(self.taken)


def make_env(cfg: RunConfig, place: int, phase: str = "train", **more: Any) -> KeyedEnv:
    """One environment with its wrappers. `place`: among all of the run; `phase`: train or eval, with draws of its own;
    `more` goes to gymnasium.make. Raises UserError for one that cannot be made or has observations that no policy
    reads."""
    control = cfg.control
    name, kwargs = f"control.env_id={control.env_id}", {**control.env_kwargs, **more}
    find_environment(cfg)
    try:
        limit = control.max_episode_steps or None
        env: Any = gym.make(control.env_id, max_episode_steps=limit, disable_env_checker=True, **kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        extra = "atari" if control.env_id.startswith("ALE/") else "control"
        raise UserError(f"{name}: {_line(error)}; {EXTRA[extra]}") from error
    except Exception as error:  # of foreign code
        raise UserError(f"{name}: control.env_kwargs={control.env_kwargs}: {_line(error)}") from error
    if control.preprocess == "atari":
        from skyrl.trainers.control.atari import wrap_atari

        env = wrap_atari(env, control, training=phase == "train")
    space = env.observation_space
    if isinstance(space, FLAT):
        env = gym.wrappers.FlattenObservation(env)
    elif not isinstance(space, gym.spaces.Box):
        raise UserError(
            f"{name}: its observations are a {type(space).__name__}, and a policy reads one array; register it with a "
            "wrapper that makes one, such as gymnasium.wrappers.FlattenObservation"
        )
    if control.frame_stack > 1:
        env = gym.wrappers.FrameStackObservation(env, control.frame_stack)
    return KeyedEnv(env, (cfg.seed, phase, place))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def make_envs(cfg: RunConfig, places: Sequence[int], phase: str = "train") -> VectorEnv:
    """The environments at these places in one vector; an episode's end and the next one's start are one step. Raises
    UserError as make_env does."""
    made = [lambda place=place: make_env(cfg, place, phase) for place in places]
    if cfg.control.vectorization == "async" and phase == "train":
        return AsyncVectorEnv(made, autoreset_mode=AutoresetMode.SAME_STEP)
    return SyncVectorEnv(made, autoreset_mode=AutoresetMode.SAME_STEP)


def last_observations(observations: np.ndarray, done: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
    """What was observed at the end of the step [N, *shape]: where an episode has ended, its own last observation and
    not the next one's first."""
    if not done.any():
        return observations
    last = observations.copy()
    for i in np.flatnonzero(done):
        last[i] = infos["final_obs"][i]
    return last


def ended_episodes(infos: dict[str, Any]) -> list[tuple[float, float]]:
    """(return, length) of the episodes that have ended in this step, in the order of their environments."""
    final = infos.get("final_info", {})
    if "_episode_return" not in final:  # none, or lives of a game that goes on
        return []
    mask = final["_episode_return"]
    return list(zip(final["episode_return"][mask].tolist(), final["episode_length"][mask].tolist(), strict=True))


def check_numbers(what: str, values: np.ndarray, places: Sequence[int], env_id: str) -> None:
    """Raises UserError for the first environment whose observations or rewards [N, ...] are not finite numbers."""
    if values.dtype != np.uint8 and not np.isfinite(values).all():
        place = next(places[i] for i, one in enumerate(values) if not np.isfinite(one).all())
        raise UserError(f"control.env_id={env_id}: environment {place} gave {what} that is not finite; mend it there")
