"""Atari games as they are trained on: Gymnasium's preprocessing, and of ours what begins a life and ends an episode.

Mnih et al. 2015 (Nature 518), Methods; Machado et al. 2018 (arXiv 1709.06009) on evaluation.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from skyrl.types import UserError


def wrap_atari(env: Any, cfg: Any, *, training: bool = True) -> Any:
    """The usual chain over a game that skips no frames by itself (`control.env_kwargs.frameskip=1`).

    Up to 30 frames without an action at reset, each action for 4 frames, the maximum of the last two, grey, at
    `cfg.frame_size` pixels on a side: observations are uint8 [side, side]. FIRE is pressed where a life begins. In
    `training` a lost life ends the episode and rewards are their signs; otherwise whole games with their own rewards.
    At the end of a game the info has Gymnasium's "episode": its whole return, without signs, and its length in frames;
    at the end of a life that is not the last one "life_lost".
    Raises UserError for an environment that is no such game, and without opencv.
    """
    where = "control.preprocess=atari"
    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    if not hasattr(env.unwrapped, "ale"):
        raise UserError(f"{where}: {name} is no Atari game; take it out, or give an id such as ALE/Pong-v5")
    if getattr(env.unwrapped, "_frameskip", None) != 1:
        raise UserError(f"{where}: {name} skips frames itself; set control.env_kwargs.frameskip=1")
    if len(env.observation_space.shape) < 2:
        raise UserError(f"{where}: {name} gives no pictures; set control.env_kwargs.obs_type=grayscale")
    wrappers = gymnasium.wrappers
    try:
        env = wrappers.AtariPreprocessing(wrappers.RecordEpisodeStatistics(env), screen_size=cfg.frame_size)
    except gymnasium.error.DependencyNotInstalled:
        raise UserError(f"{where}: needs opencv; pip install 'skyrl-spmd[atari]'") from None
    env = AtariLives(env, episodic=training)
    return wrappers.TransformReward(env, lambda reward: float(np.sign(float(reward)))) if training else env


class AtariLives(gymnasium.Wrapper):  # type: ignore[misc]
    """Presses FIRE where a life begins, since many games wait for it; with `episodic` a lost life ends the episode.

    A reset after a lost life goes on with the same game, so that late stages of it are seen. In a whole game FIRE is
    pressed inside of the step that lost the life, because a policy trained on lives has never had to.
    """

    def __init__(self, env: Any, episodic: bool) -> None:
        super().__init__(env)
        self.episodic, self.ale = episodic, env.unwrapped.ale
        meanings = env.unwrapped.get_action_meanings()
        self.fire: int | None = meanings.index("FIRE") if "FIRE" in meanings else None
        self.lives, self.goes_on = 0, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of a life or a game."""
        done = not self.goes_on
        if self.goes_on:
            observation, _, terminated, truncated, info = self.env.step(0 if self.fire is None else self.fire)
            done = terminated or truncated
        if done:
            observation, info = self._begin(seed, options)
        self.lives, self.goes_on = self.ale.lives(), False
        return observation, info

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if self.fire is not None:
            observation, _, terminated, truncated, info = self.env.step(self.fire)
            if terminated or truncated:
                observation, info = self.env.reset(seed=seed, options=options)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """One step; see the class for what is different from the game's own."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives = self.ale.lives()
        lost, self.lives = 0 < lives < self.lives, lives
        if lost and not (terminated or truncated):
            if self.episodic:
                self.goes_on = True
                return observation, reward, True, False, {**info, "life_lost": True}
            if self.fire is not None:
                observation, more, terminated, truncated, info = self.env.step(self.fire)
                reward, self.lives = float(reward) + float(more), self.ale.lives()
        return observation, reward, terminated, truncated, info
