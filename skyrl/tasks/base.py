"""What the tasks here share: made or users' rows, stages of a reward, and episodes of several turns."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult
from skyrl.envs.single_turn import no_files, require
from skyrl.types import Message, Metrics, Prompt, UserError

Tasks = Sequence[tuple[str, dict[str, Any]]]  # what is asked, and the other fields of its row; all different


class Task(Environment):
    """Prompts are the rows of data.path, or made by the task itself; which of the made ones are held out depends on the
    task alone, and the seed orders those to train on."""

    files: ClassVar[bool] = True  # whether rows may come from data.path
    num_prompts: Mapping[str, int] = {}  # of made ones, at most; all where a split is not named
    held_out: ClassVar[int] = 10  # one made task in so many
    order_by_seed: ClassVar[bool] = True  # of made ones to train on; else the same for all seeds

    def prepare(self) -> None:
        """Raises UserError at the start of a run for what would fail at the first answer."""

    def made(self) -> Tasks:
        """The tasks without data.path."""
        raise NotImplementedError

    def check(self, prompt: Prompt) -> None:
        """Raises UserError with file:line for a row that cannot be judged."""

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Rows of a file, checked, or made tasks. Raises UserError as `prepare` and `check` do."""
        env = cls(**options)
        if not cls.files:
            no_files(cls.name, data)
        env.prepare()
        if data.path or (data.eval_path and split == "test"):
            prompts = super().dataset(options, data, split, seed)
            for prompt in prompts:
                env.check(prompt)
            return prompts
        tasks = env.made()
        order = list(range(len(tasks)))
        random.Random(f"skyrl.{cls.name}").shuffle(order)
        cut = max(1, len(order) // cls.held_out)
        order = order[:cut] if split == "test" else order[cut:] or order  # a single one is both: data.py refuses it
        if split == "train" and cls.order_by_seed:
            random.Random(f"skyrl.{cls.name}/{seed}").shuffle(order)
        asked = [tasks[index] for index in order[: env.num_prompts.get(split)]]
        return [
            Prompt(f"{cls.name}/{split}/{number}", cls.name, [{"role": "user", "content": text}], extra)
            for number, (text, extra) in enumerate(asked)
        ]


class TurnedTask(Task):
    """An episode of at most env.max_turns turns. Subclasses write `turn` and `score`; `role` is whose words the model
    reads."""

    role = "user"

    def __init__(self, max_turns: int) -> None:
        if max_turns < 1:
            raise UserError(f"env.max_turns={max_turns}: wanted at least 1")
        self.max_turns, self.turns = max_turns, 0

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts an episode with the prompt's messages."""
        self.turns = 0
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """What the model reads after its text; None when that has ended the episode."""
        raise NotImplementedError

    def score(self) -> tuple[float | dict[str, float], Metrics]:
        """Reward and metrics of an episode that has ended, or whose turns are used up."""
        raise NotImplementedError

    def step(self, text: str) -> StepResult:
        """One turn; the whole reward comes with the last."""
        said = self.turn(text)  # may raise and be called again: nothing is counted before
        self.turns += 1
        if said is not None and self.turns < self.max_turns:
            return StepResult(0.0, False, [{"role": self.role, "content": said}])
        reward, metrics = self.score()
        return StepResult(reward, True, metrics=metrics)


def require_weights(**weights: float) -> dict[str, float]:
    """The parts of a reward by name. Raises UserError for one below 0."""
    for name, value in weights.items():
        require(0.0 <= value <= 1e6, name, value, "0 or more")
    return weights


def require_counts(**counts: int) -> None:
    """Raises UserError for an option that is below 1."""
    for name, value in counts.items():
        require(value > 0, name, value, "1 or more")


def staged(weights: Mapping[str, float], stages: Mapping[str, float], correct: bool) -> tuple[float, Metrics]:
    """The weighted sum of a reward's parts (0 to 1 each), and all of them as metrics."""
    metrics = {f"{name}:mean": float(part) for name, part in stages.items()}
    return sum(weights[name] * part for name, part in stages.items()), {**metrics, "correct:mean": float(correct)}


def last_block(text: str, languages: str) -> str:
    """What an answer gives: its last fenced block of one of the languages ("sql|sqlite") or of none, else all of it."""
    fence = rf"```(?:{languages})?[ \t]*\n(.*?)(?:^```|\Z)"
    blocks = re.findall(fence, text, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    return blocks[-1] if blocks else text


def field_of(prompt: Prompt, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """A field of a row. Raises UserError with file:line where it is missing, of another type, or empty."""
    value = prompt.extra.get(name)
    if not isinstance(value, kind) or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
        raise wrong_field(prompt, name, wanted)
    return value


def wrong_field(prompt: Prompt, name: str, wanted: str) -> UserError:
    """The error for a field of a row that is not what it must be."""
    return UserError(f"{prompt.place}: field {name!r} is {repr(prompt.extra.get(name))[:80]}, wanted {wanted}")
