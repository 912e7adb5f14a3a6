"""Environments; importing this registers the built-in ones. Imports without torch."""

from skyrl.envs import arithmetic, expressions, gsm8k, guess_number, reasoning_gym, single_turn
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
    "arithmetic",
    "environment_options",
    "expressions",
    "gsm8k",
    "guess_number",
    "make_environment",
    "reasoning_gym",
    "register_environment",
    "single_turn",
]
