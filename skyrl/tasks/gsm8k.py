"""GSM8K (arXiv 2110.14168): whole problems in words, answered with reasoning and a final "#### <number>" line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from skyrl.answers.equal import answers_equal
from skyrl.config.schema import DataConfig
from skyrl.envs.base import Split, register_environment
from skyrl.envs.data_files import Example, data_file, is_file_path, read_examples
from skyrl.envs.rewards.base import RewardOption
from skyrl.envs.rewards.math import extract_answer
from skyrl.envs.single_turn import SingleTurn
from skyrl.hub.locate import limit_silence, may_pass
from skyrl.registry import import_extra
from skyrl.types import PassingError, Prompt, UserError

INSTRUCTION = 'Think step by step. End with "#### " and the answer as a number.'
ANNOTATION = re.compile(r"<<[^<>]*>>")


@register_environment("gsm8k")
class Gsm8k(SingleTurn):
    """Rows with "question" and "answer" from data.path: a .jsonl file, or a data set id such as openai/gsm8k.

    reward: "math" (exact, numeric and symbolic check of the marked answer), "math_last_number", "format" or another
    registered one. instruction: added below the question; "" = nothing. system: text of a system message; "" = none.
    """

    in_process = True

    def __init__(self, *, reward: RewardOption = "math", instruction: str = INSTRUCTION, system: str = "") -> None:
        super().__init__(reward=reward)
        self.instruction, self.system = instruction, system

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the marked final answer is right, whatever the reward says."""
        del reward
        answer = extract_answer(text)
        return answer is not None and answers_equal(answer, self.prompt.extra["answer"])

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Problems in the order of their file. The solution is the row's own, without the <<calculations>>.

        A plain list: about 1.4 kB a row, texts included. Raises UserError with file:line for a row without its fields
        or without a "####" answer, and for a data set id while the datasets package is missing.
        """
        del seed
        env = cls(**options)
        return [env._prompt(row, split, n) for n, row in enumerate(gsm8k_rows(data, split))]

    def read(self, row: Example) -> tuple[str, str, str]:
        """Question, solution and final answer of a row. Raises UserError with file:line."""
        solution = ANNOTATION.sub("", row.text("answer")).strip()
        answer = extract_answer(solution)
        if answer is None:
            raise UserError(f"{row.source}: field 'answer' does not end with '#### <number>'")
        return row.text("question").strip(), solution, answer

    def _prompt(self, row: Example, split: str, number: int) -> Prompt:
        text, solution, answer = self.read(row)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": f"{text}\n{self.instruction}" if self.instruction else text})
        extra = {"answer": answer, "solution": solution, "source": row.source}
        return Prompt(f"{self.name}/{split}/{number}", self.name, messages, extra)


def gsm8k_rows(data: DataConfig, split: Split) -> Iterable[Example]:
    """Rows of a split from a .jsonl file or a data set id; training rows end at data.max_prompts (0 = all).

    An id may carry a configuration, "openai/gsm8k:main" (":main" is assumed for names that end in gsm8k). Only an id
    makes the datasets package look on the network. data.eval_path may name another source for "test".
    """
    max_rows = data.max_prompts if split == "train" else 0
    source = data.eval_path if split == "test" and data.eval_path else data.path
    where = "data.eval_path" if split == "test" and data.eval_path else "data.path"
    if not source or is_file_path(source):
        return read_examples(data_file(data, split), max_rows)
    return _hub_rows(source, where, split, max_rows)


def _hub_rows(source: str, where: str, split: str, max_rows: int) -> list[Example]:
    datasets = import_extra(
        "datasets", f"{where}={source!r} is a data set id", "data", "give the path of a .jsonl file"
    )
    name, _, config = source.partition(":")
    if not config and name.lower().endswith("/gsm8k"):
        config = "main"
    try:
        limit_silence()
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the package raises its own and its network stack's kinds; all mean the same here
        raise (PassingError if may_pass(error) else UserError)(
            f"{where}={source!r}: no such file, and as a data set id it cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give a .jsonl file, or an id with a split {split!r}"
        ) from error
    count = min(max_rows, len(table)) if max_rows else len(table)
    return [Example(f"{source}[{split}]:{n + 1}", dict(table[n])) for n in range(count)]
