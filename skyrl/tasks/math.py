"""Problems as the MATH data set has them, and the package math-verify as a reward, behind our own check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from skyrl.answers.equal import answers_equal
from skyrl.envs.base import register_environment
from skyrl.envs.data_files import Example
from skyrl.envs.rewards import register_reward
from skyrl.envs.rewards.base import RewardOption, reference
from skyrl.envs.rewards.math import extract_answer
from skyrl.registry import import_extra
from skyrl.tasks.gsm8k import ANNOTATION, Gsm8k
from skyrl.types import Prompt, UserError

INSTRUCTION = "Think step by step. Put the final answer in \\boxed{}."
FIELDS = ("problem", "question", "prompt"), ("answer", "solution")  # of the question; of the answer
MAX_CHARACTERS = 256  # of an answer that math-verify is asked about
SECONDS = 3  # for each of its steps; a number such as 9^9^9 takes longer than anybody waits


@register_environment("math")
class MathProblems(Gsm8k):
    """Rows of data.path with "problem" (or "question", "prompt") and "answer", or a "solution" that ends in one, marked
    by \\boxed{} or "####": a .jsonl or parquet file, or a data set id, such as those of MATH, MATH-500 or GSM8K.

    reward: "math" (our check: numbers, expressions, tuples, intervals, sets, matrices, units), "math_verify" (the same,
    and where it says no, the package math-verify in a worker), or another registered one. instruction: added below the
    problem; "" = nothing. system: text of a system message; "" = none.
    """

    in_process = True

    def __init__(self, *, reward: RewardOption = "math", instruction: str = INSTRUCTION, system: str = "") -> None:
        super().__init__(reward=reward, instruction=instruction, system=system)

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the marked final answer is right; with "math_verify" as that says."""
        return reward == 1.0 if self.main_reward == "math_verify" else super().is_correct(text, reward)

    def read(self, row: Example) -> tuple[str, str, str]:
        """Question, solution and final answer of a row. Raises UserError with file:line."""
        question, field = (next((n for n in names if row.fields.get(n) is not None), names[0]) for names in FIELDS)
        given = row.fields.get(field)
        given = str(given) if type(given) in (int, float) else row.text(field)
        answer = extract_answer(given) or (given.strip() if field == "answer" else "")
        if not answer:
            raise UserError(f"{row.source}: field {field!r} does not hold an answer marked by \\boxed{{}} or ####")
        solution = ANNOTATION.sub("", str(row.fields.get("solution") or given)).strip()
        return row.text(question).strip(), f"\\boxed{{{answer}}}" if solution == answer else solution, answer


def _check_row(prompt: Prompt) -> None:
    _verifier()  # the package, before the first step of whichever environment has this reward
    reference(prompt)


@register_reward("math_verify", answer=True, check=_check_row)
def math_verify_reward(text: str, prompt: Prompt) -> float:
    """Like "math"; an answer that our check calls wrong is given to the package math-verify, unless it is long."""
    answer, wanted = extract_answer(text), reference(prompt)
    if answer is None or answers_equal(answer, wanted):
        return float(answer is not None)
    if len(answer) > MAX_CHARACTERS:
        return 0.0
    parse, verify = _verifier()
    given, right = (parse(f"\\boxed{{{one}}}", parsing_timeout=SECONDS) for one in (answer, wanted))
    return float(verify(right, given, timeout_seconds=SECONDS))


@functools.cache
def _verifier() -> tuple[Callable[..., Any], Callable[..., Any]]:
    package = import_extra("math_verify", "env.options.reward='math_verify'", "math", "take reward=math")
    return package.parse, package.verify
