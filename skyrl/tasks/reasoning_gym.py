"""Tasks of reasoning-gym (arXiv 2505.24760; Apache-2.0): over a hundred generators, each with a score of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult, register_environment
from skyrl.envs.single_turn import no_files, require
from skyrl.registry import import_extra
from skyrl.types import Message, Prompt, UserError

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@register_environment("reasoning_gym")
class ReasoningGym(Environment):
    """One question of a generator, scored by the generator's own function, 0 to 1.

    dataset: its name, for example "chain_sum"; config: its own options, for example {max_terms: 2}. What is scored is
    the last <answer>...</answer> of the text, or the whole text without one. instruction: added below the question.
    before: messages before it, such as a system message or answered questions. num_train, num_test: questions made; a
    held-out question is never one of the training ones, which are fewer where the generator repeats itself.
    """

    def __init__(
        self,
        *,
        dataset: str,
        config: dict[str, Any] | None = None,
        instruction: str = "Reply with the answer only, as <answer>...</answer>.",
        before: list[Message] | None = None,
        num_train: int = 5000,
        num_test: int = 256,
    ) -> None:
        require(num_train > 0, "num_train", num_train, "at least 1")
        require(num_test > 0, "num_test", num_test, "at least 1")
        self.generator, self.config, self.instruction = dataset, json.dumps(config or {}), instruction
        self.before, self.sizes = before or [], {"train": num_train, "test": num_test}

    def step(self, text: str) -> StepResult:
        """Scores the answer; always the last step. Right is a score of 1."""
        seed, size, index = self.prompt.extra["place"]
        entries = _entries(self.generator, self.config, seed, size)
        found = ANSWER.findall(text)
        try:
            reward = float(entries.score_answer((found[-1] if found else text).strip(), entry=entries[index]))
        except Exception:  # some data sets' functions expect no answer of another form
            reward = 0.0
        return StepResult(reward, True, metrics={"correct:mean": float(reward >= 1.0)})

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Different questions. The seed chooses those to train on; the held-out ones are always the same.

        Raises UserError when the package is missing, for a name or config that it refuses, and when data.path is set.
        """
        no_files(cls.name, data)
        env = cls(**options)
        kept = env._questions("test", 0)
        if split == "train":
            held_out = {prompt.messages[-1]["content"] for prompt in kept}
            kept = [p for p in env._questions("train", seed) if p.messages[-1]["content"] not in held_out]
            if not kept:
                raise UserError(
                    f"env.options.dataset={env.generator!r}: all its questions are held out; lower num_test"
                )
        return kept

    def _questions(self, split: Split, seed: int) -> list[Prompt]:
        # The package draws item i with the seed + i: neighbouring seeds would share nearly all of their items.
        digest = blake2b(f"skyrl.reasoning_gym/{split}/{seed}".encode(), digest_size=4).digest()
        number = int.from_bytes(digest, "little") >> 1
        entries = _entries(self.generator, self.config, number, self.sizes[split])
        found: dict[str, Prompt] = {}
        for index in range(len(entries)):
            entry = entries[index]
            question = f"{entry['question']}\n{self.instruction}" if self.instruction else entry["question"]
            extra: dict[str, Any] = {"place": (number, len(entries), index)}
            if entry["answer"] is not None:  # a few data sets can judge an answer and give none
                extra |= {"answer": str(entry["answer"]), "solution": str(entry["answer"])}
            messages = [*self.before, {"role": "user", "content": question}]
            found.setdefault(question, Prompt(f"{self.name}/{split}/{index}", self.name, messages, extra))
        return list(found.values())


@lru_cache(maxsize=64)
def _entries(name: str, config: str, seed: int, size: int) -> Any:
    """The package's data set; its items depend on the seed and their index alone."""
    reasoning_gym = import_extra("reasoning_gym", "env.name=reasoning_gym", "reasoning-gym", "name another environment")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(config))
    except Exception as error:  # of the data set's own check of its options: assertions, TypeError, ValueError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"env.options.dataset={name}, config={config}: reasoning-gym refuses it: {reason}") from error
