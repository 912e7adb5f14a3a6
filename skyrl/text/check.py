"""What a chat template would leave out of a conversation without a word, and text that is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from skyrl.types import Message, UserError

# Variables of templates that are said in other ways.
TAKEN = {"messages", "add_generation_prompt", "continue_final_message", "tokenize", "bos_token", "eos_token"}
TAKEN |= {"raise_exception", "strftime_now"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields of a message beside its content
MAX_TRIED = 16  # kinds of messages without a text in one conversation
Write = Callable[[Sequence[Message]], str]


def check_text(text: str) -> str:
    """`text` as it is. Raises UserError for half of a surrogate pair, which no tokenizer reads: JSON may hold one."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(text[error.start]):04x}"
            raise UserError(
                f"character {error.start + 1} of the text is {code}, half of a surrogate pair and no text; remove it, "
                "or write the whole character"
            ) from None
    return text


def template_variables(template: Any) -> set[str] | None:
    """The variables that a chat template reads besides those that are said in other ways. None: nobody can tell, for
    templates with names and for one with tags of transformers' own; what is wrong with it is told where it is used."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if template and not isinstance(template, str):
        return None
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(template or "")
    except TemplateSyntaxError:
        return None
    return meta.find_undeclared_variables(parsed) - TAKEN - environment.globals.keys()


def structure(message: Message) -> tuple[Any, ...]:
    """What decides whether a template writes a message: its role, whether its text is blank, and further fields."""
    return (message["role"], not message["content"].strip(), *sorted(key for key in message if message[key]))


def lost_message(messages: Sequence[Message], write: Write, template: Any = None) -> str:
    """What of `messages` is not in the text that `write` makes of them, and what to do; "" when all of it is.

    Each text is replaced by a word that occurs nowhere else, so only roles and fields decide (`structure`). A blank
    message, and tool_calls, must make a difference to what is written; of many alike the first and the last are tried.
    What an answer thought may be left out on purpose, but not by a `template` that does not know such a field.
    """
    marked = [{**m, "content": f"MESSAGE{i}STANDSHERE"} if m["content"].strip() else m for i, m in enumerate(messages)]
    try:
        text = write(marked)
    except Exception:  # the template refuses these roles, or looks into the texts: the real ones decide then
        return ""
    for i, message in enumerate(messages):
        unknown = [
            name for name in THOUGHTS if message.get(name) and isinstance(template, str) and name not in template
        ]
        if unknown:
            return (
                f"the {unknown[0]} of {_place(messages, i)} is not read by the chat template; put it into the content"
            )
    advice = "give it another role, or a template that knows it (model.chat_template)"
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, message in enumerate(messages):
        if message["content"].strip() and f"MESSAGE{i}STANDSHERE" not in text:
            return f"{_place(messages, i)} is not written by the chat template, so no model would see it; {advice}"
        if message.get("tool_calls") or not message["content"].strip():
            alike.setdefault(structure(message), []).append(i)
    if len(alike) > MAX_TRIED:  # each costs a text of its own
        return f"{len(alike)} roles have messages without a text; remove these messages"
    for i in sorted({i for places in alike.values() for i in (places[0], places[-1])}):
        message, others = marked[i], [*marked[:i], *marked[i + 1 :]]
        if not message.get("tool_calls"):
            if _equal(write, text, others):
                return f"{_place(messages, i)} is empty, and the chat template writes nothing for it; remove it"
        else:
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if _equal(write, text, [*marked[:i], without, *marked[i + 1 :]]):
                return f"the tool_calls of {_place(messages, i)} are not written by the chat template; {advice}"
    return ""


def _place(messages: Sequence[Message], i: int) -> str:
    return f"message {i + 1} of {len(messages)} (role {messages[i]['role']!r})"


def _equal(write: Write, text: str, others: Sequence[Message]) -> bool:
    try:
        return bool(others) and write(others) == text
    except Exception:  # the template wants this message
        return False
