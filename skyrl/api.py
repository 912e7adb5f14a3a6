"""What a user's script or plugin imports. Imports without torch."""

from skyrl.envs.base import Environment, StepResult, register_environment
from skyrl.envs.rewards.base import register_reward
from skyrl.types import Message, Metrics, Prompt, UserError

__all__ = [
    "Environment",
    "Message",
    "Metrics",
    "Prompt",
    "StepResult",
    "UserError",
    "register_environment",
    "register_reward",
]
