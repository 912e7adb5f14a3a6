"""An environment with a tool, over several turns: the model may ask a calculator before it answers.

    python -m skyrl.train experiment=custom model=tiny plugins=[examples.tool_environment] env.name=calculator \
        env.max_turns=3 sampler.max_new_tokens=16

A turn that contains <calc>12*7</calc> is answered with the value; any other turn is the answer. Tokens of the tool's
answers are read by the model and not trained: the loop keeps the mask.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from skyrl.api import Environment, Prompt, StepResult, register_environment

CALL = re.compile(r"<calc>\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*</calc>")


@register_environment("calculator")
class Calculator(Environment):
    """Reward 1 for the right answer, less `cost` for every call of the tool. max_turns receives env.max_turns."""

    def __init__(self, *, cost: float = 0.05, max_turns: int = 1) -> None:
        self.cost, self.max_turns = cost, max_turns
        self.calls = 0

    def step(self, text: str) -> StepResult:
        """One turn of the model: a call of the tool, or the answer."""
        self.calls += 1
        call = CALL.search(text)
        if call and self.calls < self.max_turns:
            a, operation, b = int(call[1]), call[2], int(call[3])
            value = a + b if operation == "+" else a - b if operation == "-" else a * b
            return StepResult(-self.cost, done=False, observation=[{"role": "user", "content": f"{value}="}])
        right = text.strip() == str(self.prompt.extra["answer"])
        return StepResult(float(right), True, metrics={"correct:mean": float(right), "calls:mean": self.calls - 1.0})

    @classmethod
    def dataset(cls, options: dict[str, Any], data: Any, split: str, seed: int) -> Sequence[Prompt]:
        """Products of two numbers; the held-out ones have another first factor."""
        draw = random.Random(f"calculator {split} {seed if split == 'train' else 0}")
        first = range(10, 90) if split == "train" else range(90, 100)
        pairs = [(draw.choice(first), draw.randint(10, 99)) for _ in range(512 if split == "train" else 64)]
        return [
            Prompt(
                f"{cls.name}/{split}/{n}",
                cls.name,
                [{"role": "user", "content": f"{a}*{b}="}],
                {"answer": a * b},
            )
            for n, (a, b) in enumerate(pairs)
        ]
