"""An environment of your own: the model is shown a letter and answers with the next one.

    python -m skyrl.train experiment=custom model=tiny plugins=[examples.environment] env.name=next_letter \
        sampler.max_new_tokens=4

The prompts are made in code here; with rows in a file leave `dataset` out and give `data.path`.
"""

import string
from collections.abc import Sequence
from typing import Any

from skyrl.api import Environment, Prompt, StepResult, UserError, register_environment


@register_environment("next_letter")
class NextLetter(Environment):
    """Reward 1 for the letter that is `distance` places further in the alphabet. The arguments are env.options.*."""

    def __init__(self, *, distance: int = 1) -> None:
        if not 1 <= distance <= 20:
            raise UserError(f"env.options.distance={distance}: wanted 1 to 20")
        self.distance = distance

    def step(self, text: str) -> StepResult:
        """Scores the answer and ends the episode. "correct:mean" is what evaluation calls accuracy."""
        right = text.strip() == chr(ord(self.prompt.extra["letter"]) + self.distance)
        return StepResult(float(right), done=True, metrics={"correct:mean": float(right)})

    @classmethod
    def dataset(cls, options: dict[str, Any], data: Any, split: str, seed: int) -> Sequence[Prompt]:
        """One prompt a letter; every fifth is held out."""
        letters = string.ascii_lowercase[: 26 - cls(**options).distance]
        chosen = letters[::5] if split == "test" else [one for n, one in enumerate(letters) if n % 5]
        return [
            Prompt(f"{cls.name}/{split}/{n}", cls.name, [{"role": "user", "content": f"{one}="}], {"letter": one})
            for n, one in enumerate(chosen)
        ]
