"""An environment whose reward varies from the first step on, and that misbehaves when told to."""

import os
import time

from skyrl.api import Environment, Prompt, StepResult, register_environment


@register_environment("letters")
class Letters(Environment):
    """Reward: the share of even digits among the first four characters. `trouble` starts at one prompt, on one rank."""

    in_process = True  # most runs here are about something else

    def __init__(self, trouble: str = "", rank: int = 0, prompt: int = 5, sleep: float = 0.0) -> None:
        here = int(os.environ.get("RANK", "0")) == rank
        self.trouble, self.bad_prompt, self.sleep = trouble if here else "", prompt, sleep

    @classmethod
    def dataset(cls, options, data, split, seed):
        count = {"train": 40, "test": 8}[split]
        return [
            Prompt(
                f"{cls.name}/{split}/{i}",
                cls.name,
                [{"role": "user", "content": f"{i}=" * (200 if options.get("trouble") == "long" and i == 7 else 1)}],
                {"solution": f"{i % 10}2"},
            )
            for i in range(count)
        ]

    def step(self, text):
        time.sleep(self.sleep)
        bad = (
            self.trouble
            and self.prompt.uid.startswith(f"{self.name}/train/")
            and (int(self.prompt.uid.rsplit("/", 1)[1]) % 8 == self.bad_prompt % 8)
        )
        if bad and self.trouble == "raise":
            raise KeyError("no such answer")
        if bad and self.trouble == "hang":
            time.sleep(3600)
        if bad and self.trouble == "spin":
            while True:
                pass
        if bad and self.trouble == "die":
            os.kill(os.getpid(), 9)
        reward = sum(c in "02468" for c in text[:4]) / 4
        return StepResult(float("nan") if bad and self.trouble == "not_a_number" else reward, done=True)


@register_environment("letters_apart")
class LettersApart(Letters):
    """The same in worker processes: what a class says of itself is not inherited."""
