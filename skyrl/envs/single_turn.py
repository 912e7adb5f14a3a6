"""One question, one answer, one reward function. The parent of the built-in single-turn environments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, StepResult, chosen_rewards, register_environment
from skyrl.envs.rewards.base import Reward, RewardOption, add_objectives, reference, reward_names
from skyrl.types import Prompt, UserError


@register_environment("single_turn")
class SingleTurn(Environment):
    """Rows of data.path (field "messages" or "prompt", usually "answer") scored by a reward function.

    reward: a registered reward function, or several, some with parameters, [math, {name: overlong, limit: 64}]. Several
    give named objectives, each called as its reward is; weights are algorithm.objectives.weights.
    correct_reward: an answer with at least this reward (of several the first one's) counts as correct in the accuracy
    that evaluation reports; no effect on training.
    """

    in_process = True

    def __init__(self, *, reward: RewardOption, correct_reward: float = 1.0) -> None:
        self.reward_name = ", ".join(reward_names(reward))  # guard.py names it in errors
        chosen = chosen_rewards(reward)
        self._rewards = [(one, params) for one, params in chosen if not (one.group or one.batch)]
        self._named = isinstance(reward, list) or not self._rewards
        self.main_reward = self._rewards[0][0].name if self._rewards else ""
        require(abs(correct_reward) < float("inf"), "correct_reward", correct_reward, "a finite number")
        self._correct_reward = correct_reward

    @classmethod
    def plays_in_process(cls, options: dict[str, Any]) -> bool:
        """As the class says, with our own rewards: a user's, and a judge's, is called in a worker."""
        ours = all(one.batch or one.__module__.startswith("skyrl.envs.") for one, _ in _chosen(cls, options))
        return ours and super().plays_in_process(options)

    @classmethod
    def is_async(cls, options: dict[str, Any]) -> bool:
        """Also when a reward is `async def`."""
        waits = any(inspect.iscoroutinefunction(reward.fn) for reward, _ in _chosen(cls, options))
        return waits or super().is_async(options)

    @classmethod
    def objective_names(cls, options: dict[str, Any]) -> Sequence[str]:
        """Those of its rewards, if each of them says what it returns. None for a single one that returns a number."""
        listed = isinstance(_option(cls, options), list)
        known = [
            one.known_objectives if listed or one.group or one.batch else one.objectives
            for one, _ in _chosen(cls, options)
        ]
        return [name for names in known for name in names] if all(known) else []

    @classmethod
    def group_rewards(cls, options: dict[str, Any]) -> RewardOption:
        """Those of the option `reward` that are of a group or a batch."""
        chosen = [(one, params) for one, params in _chosen(cls, options) if one.group or one.batch]
        return [{**params, "name": reward.name} for reward, params in chosen]

    @classmethod
    def row_checks(cls, options: dict[str, Any]) -> list[Callable[[Prompt], object]]:
        """What its rewards read of a row: an answer to compare with, or what their `check` asks for."""
        chosen = [(reward, params) for reward, params in _chosen(cls, options) if reward.answer or reward.check]
        return [functools.partial(one.check, **params) if one.check else reference for one, params in chosen]

    def step(self, text: str) -> StepResult:
        """Scores the answer; always the last step. Awaited where a reward is `async def`."""
        values, names = [], self.reward_name
        for reward, params in self._rewards:
            self.reward_name = reward.name  # whose fault it is
            values.append(reward(text, self.prompt, **params))
        self.reward_name = names
        if not any(map(inspect.isawaitable, values)):
            return self._result(text, values)

        async def later() -> StepResult:
            return self._result(text, [await one if inspect.isawaitable(one) else one for one in values])

        return cast(StepResult, later())

    def _result(self, text: str, values: Sequence[Any]) -> StepResult:
        given: dict[str, Any] = {}
        metrics, named = {}, self._named
        for (reward, _), value in zip(self._rewards, values, strict=True):
            add_objectives(given, reward, value)
            named = named or isinstance(value, Mapping)
            if reward.rate and hasattr(value, "__float__"):
                metrics[f"{reward.rate}:mean"] = float(value != 0)
        first: Any = next(iter(given.values()), None)
        if hasattr(first, "__float__"):  # else nothing, a text, a list: the guard says so
            metrics["correct:mean"] = float(self.is_correct(text, first))
        return StepResult(given if named else first, True, metrics=metrics)

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the answer counts as right in evaluation. Here: the reward reaches correct_reward."""
        del text
        return reward >= self._correct_reward


def _option(cls: type[Environment], options: dict[str, Any]) -> RewardOption:
    """What the option `reward` says, or its default."""
    return options.get("reward", inspect.signature(cls).parameters["reward"].default)


def _chosen(cls: type[Environment], options: dict[str, Any]) -> list[tuple[Reward, dict[str, Any]]]:
    return chosen_rewards(_option(cls, options))


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
