"""One question, one answer, one reward function. The parent of the built-in single-turn environments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult, register_environment
from skyrl.envs.rewards import REWARDS
from skyrl.envs.rewards.base import ANSWERED, reference
from skyrl.types import Prompt, UserError


@register_environment("single_turn")
class SingleTurn(Environment):
    """Rows of data.path (field "messages" or "prompt", usually "answer") scored by a reward function.

    reward: a registered reward function. correct_reward: an answer with at least this reward counts as correct in the
    accuracy that evaluation reports; no effect on training.
    """

    in_process = True

    def __init__(self, *, reward: str, correct_reward: float = 1.0) -> None:
        self.reward_name = reward  # guard.py names it in errors
        self._reward = REWARDS.get(reward, "env.options.reward")
        self._correct_reward = correct_reward

    @classmethod
    def plays_in_process(cls, options: dict[str, Any]) -> bool:
        """As the class says, with one of our own rewards: a user's reward is called in a worker."""
        if not super().plays_in_process(options):
            return False
        reward = options.get("reward", inspect.signature(cls).parameters["reward"].default)
        return REWARDS.get(reward, "env.options.reward").__module__.startswith("skyrl.envs.")

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Rows of a file; where the reward compares with their answers, each has one, else UserError by file:line."""
        prompts = super().dataset(options, data, split, seed)
        for prompt in prompts if options.get("reward") in ANSWERED else ():
            reference(prompt)
        return prompts

    def step(self, text: str) -> StepResult:
        """Scores the answer; always the last step."""
        reward = self._reward(text, self.prompt)
        if not hasattr(reward, "__float__"):  # nothing, a text, a list: the guard says so
            return StepResult(reward, True)
        return StepResult(reward, True, metrics={"correct:mean": float(self.is_correct(text, reward))})

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the answer counts as right in evaluation. Here: the reward reaches correct_reward."""
        del text
        return reward >= self._correct_reward


def no_files(name: str, data: DataConfig) -> None:
    """Raises UserError when data names a file and the environment makes its own prompts."""
    where = "data.path" if data.path else "data.eval_path"
    if data.path or data.eval_path:
        raise UserError(
            f"{where}={data.path or data.eval_path!r}: environment {name!r} makes its own prompts; leave it empty, or "
            "choose another env.name"
        )


def require(condition: bool, option: str, value: object, wanted: str) -> None:
    """Raises UserError naming env.options.<option> unless the condition holds."""
    if not condition:
        raise UserError(f"env.options.{option}={value!r}: wanted {wanted}")
