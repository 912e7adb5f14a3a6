"""The calculations that GSM8K's solutions are annotated with, <<48/2=24>>: real data that a tiny model can learn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from skyrl.answers.equal import parse_number
from skyrl.answers.parse import ExpressionError, evaluate, parse
from skyrl.config.schema import DataConfig
from skyrl.envs.base import Split, register_environment
from skyrl.envs.data_files import Example
from skyrl.envs.rewards.base import RewardOption
from skyrl.envs.single_turn import SingleTurn, require
from skyrl.tasks.gsm8k import gsm8k_rows
from skyrl.types import Prompt, UserError

MAX_DECIMALS = 6
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_NOISE = re.compile(r"[$\s]|(?<=\d),(?=\d{3}(?!\d))")
_ALLOWED = re.compile(r"[0-9.+\-*/()%]+")
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")


@dataclass
class Expressions:
    """Different expressions of a file with their answers and places, and how many annotations were left out and why.

    annotations: found in all. repeated: same text as an earlier one. malformed: no expression. wrong: does not
    evaluate to what the annotation says. endless: no decimal with at most 6 places. trivial: nothing to calculate.
    """

    answers: dict[str, tuple[str, str]] = field(default_factory=dict)  # expression -> answer, file:line
    annotations: int = 0
    repeated: int = 0
    malformed: int = 0
    wrong: int = 0
    endless: int = 0
    trivial: int = 0

    def add(self, annotation: str, source: str) -> None:
        """Takes one annotation such as "48/2=24", or counts why not."""
        self.annotations += 1
        expression, result = (normalise(part) for part in annotation.replace("x", "*").partition("=")[::2])
        if expression in self.answers:
            self.repeated += 1
            return
        try:
            if not _ALLOWED.fullmatch(expression) or not _ALLOWED.fullmatch(result):
                raise ExpressionError(annotation)
            value, said = evaluate(parse(expression)), evaluate(parse(result))
        except ExpressionError:
            self.malformed += 1
            return
        answer = decimal(value)
        if value != said:
            self.wrong += 1
        elif answer is None:
            self.endless += 1
        elif not re.search(r"(?<=[\d)%])[-+*/]", expression):
            self.trivial += 1
        else:
            self.answers[expression] = (answer, source)

    def __str__(self) -> str:
        names = ("repeated", "malformed", "wrong", "endless", "trivial")
        left_out = ", ".join(f"{getattr(self, name)} {name}" for name in names)
        return f"{len(self.answers)} expressions of {self.annotations} annotations ({left_out})"


def normalise(text: str) -> str:
    """The text without white space, dollar signs and thousands commas; numbers as 0.5 (not .5), 1.5 (not 1.50)."""
    return _NUMBER.sub(lambda match: _tidy(match[0]), _NOISE.sub("", text))


def _tidy(number: str) -> str:
    whole, _, part = number.partition(".")
    part = part.rstrip("0")
    whole = whole.lstrip("0") or "0"
    return f"{whole}.{part}" if part else whole


def decimal(value: Fraction) -> str | None:
    """The value written as a decimal ("24", "-0.25"), or None when that takes more than 6 places."""
    scaled = abs(value) * 10**MAX_DECIMALS
    if scaled.denominator != 1:
        return None
    whole, part = divmod(scaled.numerator, 10**MAX_DECIMALS)
    return "-" * (value < 0) + _tidy(f"{whole}.{part:0{MAX_DECIMALS}}")


def collect_expressions(rows: Iterable[Example]) -> Expressions:
    """All annotated calculations of GSM8K rows, each once, in the order of their first occurrence."""
    found = Expressions()
    for row in rows:
        for match in _ANNOTATION.finditer(row.text("answer")):
            found.add(match[1], row.source)
    return found


@register_environment("gsm8k_expressions")
class Gsm8kExpressions(SingleTurn):
    """Prompts such as "48/2=" with the answer "24", from data.path (a GSM8K .jsonl file, or a data set id).

    reward: "number" (any spelling of the right number), "exact", "characters" or another registered one.
    max_characters: longer expressions are left out of both splits; 0 = no limit.
    """

    in_process = True

    def __init__(self, *, reward: RewardOption = "number", max_characters: int = 0) -> None:
        super().__init__(reward=reward)
        require(max_characters >= 0, "max_characters", max_characters, "0 (no limit) or more")
        self.max_characters = max_characters

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the whole text is the right number; a calculation, such as the question itself, is none."""
        del reward
        value = parse_number(text)
        return value is not None and value == Fraction(self.prompt.extra["answer"])

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Different expressions in the order of the file; held out are those of the test file that the training file
        does not have (in the same normalised writing).

        extra["counts"] of the first prompt says what was left out. data.max_prompts limits the expressions, not the
        rows, so the held-out part is the same for every limit. Raises UserError when nothing is left.
        """
        del seed
        env = cls(**options)
        every_row = dataclasses.replace(data, max_prompts=0)
        train = collect_expressions(gsm8k_rows(every_row, "train"))
        found = train if split == "train" else collect_expressions(gsm8k_rows(every_row, "test"))
        answers = dict(found.answers)
        counts = str(found)
        if split == "test":
            answers = {text: answer for text, answer in answers.items() if text not in train.answers}
            counts += f", {len(answers)} of them not in the training file"
        prompts: list[Prompt] = []
        for text, (answer, source) in answers.items():
            if env.max_characters and len(text) > env.max_characters:
                continue
            messages = [{"role": "user", "content": f"{text}="}]
            extra = {"answer": answer, "solution": answer, "source": source}
            prompts.append(Prompt(f"{cls.name}/{split}/{len(prompts)}", cls.name, messages, extra))
        if not prompts:
            raise UserError(f"data.path={data.path!r}: no {split} expression left of {counts}; is this GSM8K?")
        prompts[0].extra["counts"] = counts
        return prompts
