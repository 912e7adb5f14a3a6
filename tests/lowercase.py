"""An environment for tests of the loop: the reward is the share of lower-case letters, so that random text has some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult, register_environment
from skyrl.types import Message, Prompt


@register_environment("lowercase")
class Lowercase(Environment):
    """Episodes of `turns` turns; the last share counts, as a whole number of `levels` (0: as it is).

    `endings`: a prompt ends in one of these letters, so that greedy answers of random models differ.
    `broken`: prompts whose number is a multiple of it raise in their first step (0: none).
    """

    in_process = True

    def __init__(self, *, turns: int = 1, levels: int = 0, broken: int = 0, endings: str = "=") -> None:
        self.turns, self.levels, self.broken = turns, levels, broken

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts an episode."""
        self.turn = 0
        return super().reset(prompt)

    def step(self, text: str) -> StepResult:
        """Scores the last turn."""
        if self.broken and self.prompt.extra["number"] % self.broken == 0:
            raise RuntimeError("this prompt is broken")
        self.turn += 1
        if self.turn < self.turns:
            return StepResult(0.0, False, [{"role": "user", "content": f"({self.turn})"}])
        share = sum("a" <= c <= "z" for c in text) / max(1, len(text))
        if self.levels:
            share = int(share * self.levels) / self.levels
        return StepResult(share, True, metrics={"correct:mean": float(share > 0.9)})

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """100 prompts to train on, 20 held out."""
        ends = options.get("endings", "=")
        return [
            Prompt(
                f"{cls.name}/{split}/{n}",
                cls.name,
                [{"role": "user", "content": f"{split[1]}{n:02d}" + "." * (n % 4) + ends[n % len(ends)]}],
                {"number": n, "solution": "abc"},
            )
            for n in range(100 if split == "train" else 20)
        ]
