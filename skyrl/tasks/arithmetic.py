"""Multi-digit arithmetic made in code: no files, training and held-out problems never the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Split, StepResult, register_environment
from skyrl.envs.rewards.base import RewardOption
from skyrl.envs.rewards.text import is_digits
from skyrl.envs.single_turn import SingleTurn, no_files, require
from skyrl.types import Message, Prompt, UserError

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
HELD_OUT_PART = 10  # one problem in so many is held out
MAX_DIGITS = 18  # operands fit int64
WORK_END = ":"
GIVE_UP_AFTER = 2000  # draws in a row without a new problem: the digits allow no more (or nearly so)


@register_environment("arithmetic")
class Arithmetic(SingleTurn):
    """Problems such as "37+58=" with the answer "95".

    min_digits, max_digits: digits of both operands, drawn evenly per operand (1 to 18); second_digits: exact digits of
    the second operand, 0 = like the first. operations: characters out of "+-*"; differences are never negative (the
    operands are swapped). reverse: answer with the last digit first, which is easier to write left to right. pad:
    operands with leading zeros up to max_digits. work: the solution shows its work, "37+58=" -> "15,09:95": the sum
    of each column with its carry, last column first, then ":" and the answer; what follows the last ":" is scored.
    Additions only. pad_answer: answer with leading zeros up to the longest possible.
    template: the question. before: messages before it, such as a system message (without one the chat template's own
    default stands) and answered questions that show the form of an answer. num_train, num_test: different problems
    wanted; fewer where the digits allow fewer.
    reward: "exact", "characters" or another registered one. partial: least reward of any answer that consists of
    digits only (0 = off).
    """

    in_process = True

    def __init__(
        self,
        *,
        min_digits: int = 2,
        max_digits: int = 3,
        second_digits: int = 0,
        operations: str = "+",
        reverse: bool = False,
        pad: bool = False,
        pad_answer: bool = False,
        work: bool = False,
        template: str = "{a}{op}{b}=",
        before: list[Message] | None = None,
        num_train: int = 20000,
        num_test: int = 512,
        reward: RewardOption = "exact",
        partial: float = 0.0,
    ) -> None:
        super().__init__(reward=reward)
        require(1 <= max_digits <= MAX_DIGITS, "max_digits", max_digits, f"1 to {MAX_DIGITS}")
        require(1 <= min_digits <= max_digits, "min_digits", min_digits, f"1 to max_digits={max_digits}")
        require(0 <= second_digits <= MAX_DIGITS, "second_digits", second_digits, f"0 (off) to {MAX_DIGITS}")
        unique = 0 < len(operations) == len(set(operations)) and set(operations) <= OPERATIONS.keys()
        require(unique, "operations", operations, 'different characters out of "+-*"')
        require(num_train > 0, "num_train", num_train, "at least 1")
        require(num_test > 0, "num_test", num_test, "at least 1")
        require(0.0 <= partial < 1.0, "partial", partial, "0 (off) or more, below 1")
        require(
            all(part in template for part in ("{a}", "{op}", "{b}")), "template", template, "{a}, {op} and {b} in it"
        )
        self.min_digits, self.max_digits, self.second_digits = min_digits, max_digits, second_digits
        self.operations, self.reverse, self.pad, self.pad_answer = operations, reverse, pad, pad_answer
        require(not work or operations == "+", "work", work, 'false, or operations: "+"')
        self.template, self.partial, self.work = template, partial, work
        self.before = before or []
        wanted = 'messages, each {"role": ..., "content": ...}'
        require(
            all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in self.before), "before", before, wanted
        )
        self.num_problems = {"train": num_train, "test": num_test}

    def step(self, text: str) -> StepResult:
        """Scores the answer; always the last step."""
        if self.work:
            text = text.rpartition(WORK_END)[2]
        return super().step(text)

    def _result(self, text: str, values: Sequence[Any]) -> StepResult:
        result = super()._result(text, values)
        if self.partial and is_digits(text):
            if isinstance(result.reward, dict):  # of several rewards the first one
                result.reward |= {k: max(v, self.partial) for k, v in list(result.reward.items())[:1]}
            else:
                result.reward = max(result.reward, self.partial)
        return result

    def is_correct(self, text: str, reward: float) -> bool:
        """Whether the text is the answer, character by character, whatever the reward says; with `last_digits`, which
        lets words stand before the answer, whether that reward is whole."""
        if self.main_reward == "last_digits":
            return reward == 1.0
        return text.strip() == self.prompt.extra["answer"]

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Different problems, made on access from 17 bytes each. The seed chooses the training problems.

        Held-out problems are those whose keyed hash says so, the same for every seed and number of problems; a+b and
        b+a are on the same side. The held-out list itself does not depend on the seed, so runs can be compared.
        Raises UserError when the options leave no problem, or when data.path is set (nothing is read).
        """
        no_files(cls.name, data)
        return _Problems(cls(**options), cls.name, split, seed)

    def question_and_answer(self, a: int, op: str, b: int) -> tuple[str, str]:
        """The two texts of a problem, written as the options say."""
        answer = str(OPERATIONS[op](a, b))
        second = self.second_digits or self.max_digits
        if self.pad_answer:
            longest = {"+": max(self.max_digits, second) + 1, "-": max(self.max_digits, second)}
            answer = answer.zfill(longest.get(op, self.max_digits + second))
        width = max(self.max_digits, second) if self.pad else 0
        question = self.template.replace("{a}", str(a).zfill(width)).replace("{op}", op)
        return question.replace("{b}", str(b).zfill(width)), answer[::-1] if self.reverse else answer

    def draw(self, rng: random.Random) -> tuple[int, str, int]:
        """A random problem: operation, digits of each operand, then the operands, each evenly."""
        op = rng.choice(self.operations)
        digits = rng.randint(self.min_digits, self.max_digits)
        second = self.second_digits or rng.randint(self.min_digits, self.max_digits)
        a, b = (rng.randrange(10 ** (d - 1) if d > 1 else 0, 10**d) for d in (digits, second))
        return (b, op, a) if op == "-" and a < b else (a, op, b)


def column_sums(a: int, b: int) -> str:
    """The sums that adding by hand writes down: each column with the carry into it, last column first, two digits
    each: 37 and 58 -> "15,09"."""
    sums: list[str] = []
    carry = 0
    while a or b or not sums:
        total = a % 10 + b % 10 + carry
        sums.append(f"{total:02d}")
        a, b, carry = a // 10, b // 10, total // 10
    return ",".join(sums)


def is_held_out(a: int, op: str, b: int) -> bool:
    """Which side of the split a problem is on; the same for a+b and b+a, and for all options and seeds."""
    if op != "-" and a > b:
        a, b = b, a
    digest = blake2b(f"{a}{op}{b}".encode(), digest_size=8, key=b"skyrl.arithmetic").digest()
    return int.from_bytes(digest, "little") % HELD_OUT_PART == 0


class _Problems(Sequence[Prompt]):
    """Prompts made on access, so that a million of them cost 17 MB instead of a gigabyte."""

    def __init__(self, env: Arithmetic, name: str, split: Split, seed: int) -> None:
        rng = random.Random(f"skyrl.arithmetic/{split}/{seed if split == 'train' else ''}")
        found: dict[tuple[int, str, int], None] = {}  # a dict keeps the order
        idle = 0
        while len(found) < env.num_problems[split] and idle < GIVE_UP_AFTER:
            problem = env.draw(rng)
            new = problem not in found and is_held_out(*problem) == (split == "test")
            idle = 0 if new else idle + 1
            if new:
                found[problem] = None
        if not found:
            raise UserError(f"env.options.max_digits={env.max_digits}: no {split} problem exists; allow more digits")
        self._env, self._name, self._split = env, name, split
        self._a = np.array([a for a, _, _ in found], dtype=np.int64)
        self._b = np.array([b for _, _, b in found], dtype=np.int64)
        self._op = np.array([op for _, op, _ in found], dtype="S1")

    def __len__(self) -> int:
        return len(self._a)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative and out of range as in a list
        a, b = int(self._a[index]), int(self._b[index])
        question, answer = self._env.question_and_answer(a, self._op[index].decode(), b)
        messages = [*self._env.before, {"role": "user", "content": question}]
        uid = f"{self._name}/{self._split}/{index}"
        solution = f"{column_sums(a, b)}{WORK_END}{answer}" if self._env.work else answer
        return Prompt(uid, self._name, messages, {"answer": answer, "solution": solution})
