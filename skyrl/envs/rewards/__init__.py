"""Reward functions; importing this registers the built-in ones."""

from skyrl.envs.rewards import math, shape, text
from skyrl.envs.rewards.base import REWARDS, Reward, reference, register_reward

__all__ = ["REWARDS", "Reward", "math", "reference", "register_reward", "shape", "text"]
