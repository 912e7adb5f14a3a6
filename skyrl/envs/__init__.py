"""What an environment is, and single_turn; skyrl.tasks has the other built-in ones. Imports without torch."""

from skyrl.envs import single_turn
from skyrl.envs.base import (
    ENVIRONMENTS,
    Environment,
    StepResult,
    environment_options,
    register_environment,
)
from skyrl.envs.guard import Guard, Outcome
from skyrl.envs.wrappers import make_environment

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "Guard",
    "Outcome",
    "StepResult",
    "environment_options",
    "make_environment",
    "register_environment",
    "single_turn",
]
