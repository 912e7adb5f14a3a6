"""Reward functions; importing this registers the built-in ones."""

from skyrl.envs.rewards import math, text
from skyrl.envs.rewards.base import REWARDS, RewardFunction, reference, register_reward

__all__ = ["REWARDS", "RewardFunction", "math", "reference", "register_reward", "text"]
