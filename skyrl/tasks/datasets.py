"""Rows that are learned from as they are, in the fields that TRL's data sets have: conversations, and preferences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Split, StepResult, register_environment
from skyrl.envs.data_files import Example, data_file, messages_problem, read_examples
from skyrl.envs.single_turn import require
from skyrl.tasks.base import Task, Tasks
from skyrl.types import Message, Prompt, UserError


class DataRows(Task):
    """Rows of data.path, or made sums. Played, as on-policy distillation does, an episode is one answer of reward 0."""

    num_prompts = {"train": 2048, "test": 256}  # noqa: RUF012

    def __init__(self, *, digits: int = 2) -> None:
        require(digits in (1, 2), "digits", digits, "1 or 2")
        self.digits = digits

    def step(self, text: str) -> StepResult:
        return StepResult(0.0, True)

    def read(self, row: Example) -> tuple[list[Message], dict[str, Any]]:
        """What is asked, and fields for `Prompt.extra`. Raises UserError with file:line."""
        raise NotImplementedError

    def sum_row(self, a: int, b: int) -> dict[str, Any]:
        """The row that is made of a sum."""
        raise NotImplementedError

    def made(self) -> Tasks:
        """One row for each sum."""
        numbers = range(10**self.digits)
        return [("", self.sum_row(a, b)) for a in numbers for b in numbers]

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Each row as a prompt; what is learned of it is in `extra`. Raises UserError with file:line."""
        env, prompts = cls(**options), []
        if data.path or (data.eval_path and split == "test"):
            rows = list(read_examples(data_file(data, split), data.max_prompts if split == "train" else 0))
        else:
            rows = [Example(made.uid, made.extra) for made in super().dataset(options, data, split, seed)]
        for number, row in enumerate(rows):
            messages, learned = env.read(row)
            kept = {name: value for name, value in row.fields.items() if name not in ("messages", "prompt")}
            extra = {**kept, **learned, "source": row.source}
            prompts.append(Prompt(f"{cls.name}/{split}/{number}", cls.name, messages, extra))
        return prompts


@register_environment("chat")
class Conversations(DataRows):
    """Conversations to imitate: rows with "messages", or "prompt" and "completion" (texts or lists of messages); what
    ends without an answer of the assistant is a prompt, for distillation.

    train_on: "all" turns of the assistant, or the "last" one. digits: of the sums that are made without data.path: of
    two turns, the second adds one more number.
    """

    in_process = True

    def __init__(self, *, train_on: Literal["all", "last"] = "all", digits: int = 2) -> None:
        super().__init__(digits=digits)
        self.train_on = train_on

    def sum_row(self, a: int, b: int) -> dict[str, Any]:
        turns = [("user", f"{a}+{b}="), ("assistant", str(a + b)), ("user", f"+{b}="), ("assistant", str(a + 2 * b))]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    def read(self, row: Example) -> tuple[list[Message], dict[str, Any]]:
        whole = row.fields.get("messages") is not None
        if whole and (both := next((name for name in ("prompt", "completion") if row.fields.get(name)), "")):
            raise UserError(f"{row.source}: has both 'messages' and {both!r}; keep one")
        said = said_in(row, "messages" if whole else "prompt", "user")
        if not whole and row.fields.get("completion") is not None:
            said = [*said, *said_in(row, "completion", "assistant")]
        for before, message in zip([{"role": "assistant"}, *said], said, strict=False):
            if message["role"] == before["role"] == "assistant":
                raise UserError(f"{row.source}: an assistant's message answers nothing; put a user's before it")
        if said[-1]["role"] != "assistant":  # to answer, and not to learn
            return said, {}
        return said[:-1], {"solution": said[-1]["content"], "all_turns": self.train_on == "all"}


@register_environment("preference")
class Preferences(DataRows):
    """Answers that were compared or judged: rows with "prompt", "chosen" and "rejected" (texts or lists of messages; a
    prompt may be what both begin with) and, for a reward model, "margin"; or "prompt", "completion" and "label" (true:
    it was liked). digits: of the sums that are made without data.path, of which the rejected one begins with zeros.
    """

    in_process = True

    def sum_row(self, a: int, b: int) -> dict[str, Any]:
        return {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"00{a + b}"}

    def read(self, row: Example) -> tuple[list[Message], dict[str, Any]]:
        asked = said_in(row, "prompt", "user") if row.fields.get("prompt") is not None else []
        names = ("completion",) if row.fields.get("completion") is not None else ("chosen", "rejected")
        answers = [said_in(row, name, "assistant") for name in names]
        if len(names) == 1 and (pair := [name for name in ("chosen", "rejected") if row.fields.get(name) is not None]):
            raise UserError(f"{row.source}: has both 'completion' and {pair[0]!r}; keep one")
        if not asked and len(answers) == 2:
            asked = [a for a, _ in takewhile(lambda ab: ab[0] == ab[1], zip(*answers, strict=False))]
            answers = [messages[len(asked) :] for messages in answers]
        if not asked:
            raise UserError(
                f"{row.source}: nothing is asked before {' and '.join(map(repr, names))}; give a field 'prompt'"
            )
        learned: dict[str, Any] = {}
        for name, messages in zip(names, answers, strict=True):
            if [message["role"] for message in messages] != ["assistant"]:
                roles = ", ".join(message["role"] for message in messages) or "nothing"
                what = f"{row.source}: field {name!r} has {roles} after the prompt"
                raise UserError(f"{what}, wanted one answer of the assistant")
            learned[name] = messages[0]["content"]
        label, margin = row.fields.get("label"), row.fields.get("margin", 0.0)
        if len(answers) == 1 and not isinstance(label, bool):
            raise UserError(f"{row.source}: field 'label' is {label!r}, wanted true (liked) or false")
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise UserError(f"{row.source}: field 'margin' is {margin!r}, wanted a number, or no such field")
        if len(set(learned.values())) < len(answers):
            raise UserError(f"{row.source}: 'chosen' and 'rejected' are the same text; take the row out")
        return asked, {**learned, **({"solution": learned[names[0]]} if label is not False else {})}


def said_in(row: Example, field: str, role: str) -> list[Message]:
    """The messages in a field of a row; a text is one message of `role`. Raises UserError with file:line."""
    value = row.fields.get(field)
    if value is None:
        known = ", ".join(sorted(row.fields)) or "none"
        raise UserError(f"{row.source}: field {field!r} is missing; fields of this row: {known}")
    if not isinstance(value, (str, list)):
        raise UserError(f"{row.source}: field {field!r} is {value!r}, wanted a text or a list of messages")
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if problem := messages_problem(messages):
        raise UserError(f"{row.source}: field {field!r} {problem}")
    if empty := next((m for m in messages if m["role"] != "system" and not m["content"].strip()), None):
        raise UserError(
            f"{row.source}: field {field!r} has an empty text of {empty['role']!r}; write it, or take it out"
        )
    return messages
