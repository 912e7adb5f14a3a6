"""A small environment of numbers, options that make a run of it short, and an engine without a run."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
import torch

from skyrl.config.load import load_config
from skyrl.distributed.init import World
from skyrl.planner.plan import make_plan
from skyrl.trainers.control.engine import ControlEngine

SMALL = [
    "control.n_envs=4", "control.n_steps=32", "control.minibatch_size=32", "control.epochs=2",
    "control.eval_episodes=3", "eval.every_steps=0", "checkpoint.every_steps=0", "checkpoint.export=false",
    "checkpoint.async_save=false", "tracking.console=off", "tracking.system=false", "run.threads=1",
]  # fmt: skip


class Walk(gym.Env):
    """A walk of two places: a reward is what was stepped, and 7 steps are an episode's limit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, odd=""):
        self.odd = odd

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2) * 5 + 100
        return self.place.copy(), {}

    def step(self, action):
        self.place = self.place + float(action[0]) + self.np_random.normal(size=2) * 0.1
        if self.odd == "raises":
            raise OSError("the motor is gone")
        seen = {"broken": self.place * np.nan, "longer": np.zeros(3)}.get(self.odd, self.place.copy())
        return seen, float(action[0]), bool(self.np_random.random() < 0.05), False, {}


class Pair(Walk):
    observation_space = gym.spaces.Dict({"place": gym.spaces.Box(-1, 1, (2,))})


class Stopped(Walk):
    steps, at = 0, -1  # of all environments; the one in which this process is asked to stop

    def step(self, action):
        Stopped.steps += 1
        if Stopped.steps == Stopped.at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5)  # the watchdog looks twice a second
        return super().step(action)


class Told(Walk):
    action_space = gym.spaces.Text(3)


for name, kind in (("Walk-v0", Walk), ("Pair-v0", Pair), ("Told-v0", Told), ("Stopped-v0", Stopped)):
    gym.register(f"skyrl-test/{name}", kind, max_episode_steps=7)
WALK = ["env=skyrl-test/Walk-v0", "control.normalize_observations=true", "control.normalize_rewards=true"]


def engine_of(*options):
    """The engine of these options, in this process alone."""
    cfg = load_config([*SMALL, *options], mode="control")
    return ControlEngine(cfg, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")), make_plan(cfg, 1))
