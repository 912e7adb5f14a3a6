"""A small game of several turns: find a secret number from "higher" and "lower"."""

from __future__ import annotations

import re

from skyrl.envs.base import register_environment
from skyrl.envs.single_turn import require
from skyrl.tasks.base import Tasks, TurnedTask
from skyrl.types import Message, Metrics, Prompt

_INTEGER = re.compile(r"(?<![\d.])[-\u2212]?\d{1,18}(?!\d|\.\d)", re.ASCII)


@register_environment("guess_number")
class GuessNumber(TurnedTask):
    """The model guesses a number from low to high; the answer is "higher" or "lower" until it is found. One prompt per
    secret; a fifth of the secrets is held out.

    A guess is the last whole number in the model's text; a text without one is answered "not a number" and uses up a
    turn. Reward, on the turn that finds it: discount^(turns used before it). The number of turns is env.max_turns.
    """

    in_process, files, held_out, order_by_seed = True, False, 5, False

    def __init__(self, *, low: int = 1, high: int = 100, discount: float = 1.0, max_turns: int = 8) -> None:
        require(high - low >= 1, "high", high, f"more than low={low}")
        require(high - low < 10**6, "high", high, f"at most a million numbers from low={low}")
        require(0.0 < discount <= 1.0, "discount", discount, "above 0, at most 1 (no discount)")
        super().__init__(max_turns)
        self.low, self.high, self.discount = low, high, discount

    def made(self) -> Tasks:
        """One for each secret."""
        text = f"Guess my number from {self.low} to {self.high}."
        return [(text, {"secret": secret}) for secret in range(self.low, self.high + 1)]

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts a game with the prompt's secret."""
        self.right = False
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """What a guess is answered; None when it is right."""
        found, secret = _INTEGER.findall(text), self.prompt.extra["secret"]
        guess = int(found[-1].replace("\u2212", "-")) if found else None
        self.right = guess == secret
        if self.right:
            return None
        return "not a number" if guess is None else "higher" if guess < secret else "lower"

    def score(self) -> tuple[float, Metrics]:
        """Reward, and whether it was found."""
        return self.discount ** (self.turns - 1) if self.right else 0.0, {"correct:mean": float(self.right)}
