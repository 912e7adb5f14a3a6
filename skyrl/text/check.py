"""What a chat template would leave out of a conversation without a word, and text that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from skyrl.types import Message, UserError

# Variables of templates that are said in other ways.
TAKEN = set("messages add_generation_prompt continue_final_message tokenize raise_exception strftime_now".split())
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


def check_template_kwargs(template: Any, given: Iterable[str]) -> None:
    """Raises UserError for a variable of chat.template_kwargs that the chat template does not read, which would have no
    effect; and for all of them without a template. Templates with names are not looked into."""
    if not template:
        names = ", ".join(given)
        raise UserError(f"chat.template_kwargs: {names} would have no effect, the tokenizer has no chat template")
    if not isinstance(template, str):
        return
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:  # a tag of transformers' own; what is wrong with it is told where it is used
        return
    known = (
        meta.find_undeclared_variables(parsed) - TAKEN - {"raise_exception", "strftime_now", "bos_token", "eos_token"}
    )
    if unknown := [name for name in given if name not in known]:
        reads = ", ".join(sorted(known)) or "none"
        raise UserError(f"chat.template_kwargs.{unknown[0]}: the chat template does not read it; it reads: {reads}")


def structure(messages: Sequence[Message]) -> tuple[Any, ...]:
    """What decides whether a template writes these messages: roles, which texts are blank, and further fields."""
    return tuple((m["role"], not m["content"].strip(), *sorted(key for key in m if m[key])) for m in messages)


def lost_message(messages: Sequence[Message], write: Write) -> str:
    """What of `messages` is not in the text that `write` makes of them, and what to do; "" when all of it is.

    Each text is replaced by a word that occurs nowhere else, so only roles and fields decide (`structure`). A blank
    message, and tool_calls, must make a difference to what is written.
    """
    marked = [{**m, "content": f"MESSAGE{i}STANDSHERE"} if m["content"].strip() else m for i, m in enumerate(messages)]
    try:
        text = write(marked)
    except Exception:  # the template refuses these roles, or looks into the texts: the real ones decide then
        return ""
    for i, message in enumerate(messages):
        place = f"message {i + 1} of {len(messages)} (role {message['role']!r})"
        advice = "give it another role, or a template that knows it (model.chat_template)"
        if message["content"].strip() and f"MESSAGE{i}STANDSHERE" not in text:
            return f"{place} is not written by the chat template, so no model would see it; {advice}"
        if not message["content"].strip() and not message.get("tool_calls"):
            if _equal(write, marked, text, [*marked[:i], *marked[i + 1 :]]):
                return f"{place} is empty, and the chat template writes nothing for it; remove it"
        if message.get("tool_calls"):
            without = {key: value for key, value in marked[i].items() if key != "tool_calls"}
            if _equal(write, marked, text, [*marked[:i], without, *marked[i + 1 :]]):
                return f"the tool_calls of {place} are not written by the chat template; {advice}"
    return ""


def _equal(write: Write, marked: Sequence[Message], text: str, others: Sequence[Message]) -> bool:
    try:
        return bool(others) and write(others) == text
    except Exception:  # the template wants this message
        return False
