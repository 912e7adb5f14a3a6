"""A small game of several turns: find a secret number from "higher" and "lower"."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult, register_environment
from skyrl.envs.single_turn import no_files, require
from skyrl.types import Message, Prompt, UserError

HELD_OUT_PART = 5  # one secret in so many is held out
_INTEGER = re.compile(r"(?<![\d.])[-\u2212]?\d{1,18}(?!\d|\.\d)", re.ASCII)


@register_environment("guess_number")
class GuessNumber(Environment):
    """The model guesses a number from low to high; the answer is "higher" or "lower" until it is found.

    A guess is the last whole number in the model's text; a text without one is answered "not a number" and uses up a
    turn. Reward, on the turn that finds it: discount^(turns used before it). The number of turns is env.max_turns.
    """

    in_process = True

    def __init__(self, *, low: int = 1, high: int = 100, discount: float = 1.0, max_turns: int = 8) -> None:
        require(high - low >= 1, "high", high, f"more than low={low}")
        require(high - low < 10**6, "high", high, f"at most a million numbers from low={low}")
        require(0.0 < discount <= 1.0, "discount", discount, "above 0, at most 1 (no discount)")
        if max_turns < 1:
            raise UserError(f"env.max_turns={max_turns}: wanted at least 1")
        self.low, self.high, self.discount, self.max_turns = low, high, discount, max_turns

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts a game with the prompt's secret."""
        self._secret = int(prompt.extra["secret"])
        self._turns = 0
        return super().reset(prompt)

    def step(self, text: str) -> StepResult:
        """Answers one guess; done when it is right or the turns are used up."""
        self._turns += 1
        found = _INTEGER.findall(text)
        guess = int(found[-1].replace("\u2212", "-")) if found else None
        right = guess == self._secret
        if right or self._turns >= self.max_turns:
            reward = self.discount ** (self._turns - 1) if right else 0.0
            return StepResult(reward, True, metrics={"correct:mean": float(right)})
        hint = "not a number" if guess is None else "higher" if guess < self._secret else "lower"
        return StepResult(0.0, False, [{"role": "user", "content": hint}])

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """One prompt per secret; a fifth of the secrets is held out, the same ones for every seed.

        Raises UserError when data.path is set (nothing is read).
        """
        del seed
        no_files(cls.name, data)
        env = cls(**options)
        secrets = list(range(env.low, env.high + 1))
        random.Random("skyrl.guess_number").shuffle(secrets)
        num_held_out = max(1, len(secrets) // HELD_OUT_PART)
        chosen = secrets[:num_held_out] if split == "test" else secrets[num_held_out:]
        text = f"Guess my number from {env.low} to {env.high}."
        return [
            Prompt(f"{cls.name}/{split}/{n}", cls.name, [{"role": "user", "content": text}], {"secret": secret})
            for n, secret in enumerate(chosen)
        ]
