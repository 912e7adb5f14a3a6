"""The rows that trainers beside RL make of a prompt: their ids, and which of these are learned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skyrl.config.schema import RunConfig
from skyrl.judges.models import conversation_ids
from skyrl.text.chat import Chat
from skyrl.types import Datum, Ints, Prompt, UserError

RowsOf = Callable[[Chat, Prompt], list[Ints]]


def answer_row(chat: Chat, prompt: Prompt, text: str) -> tuple[Ints, np.ndarray]:
    """Ids [L] of a prompt with the answer `text`, and a mask [L] of what is learned: the answer with its end token;
    where the prompt says `all_turns`, earlier answers too. Raises UserError as the Chat does."""
    if prompt.extra.get("all_turns"):
        return chat.conversation([*prompt.messages, {"role": "assistant", "content": text}])
    opening, answer = chat.prompt(prompt.messages), chat.answer(prompt.messages, text)
    return np.concatenate([opening, answer]), np.arange(len(opening) + len(answer)) >= len(opening)


def answer_datum(chat: Chat, prompt: Prompt, text: str) -> Datum:
    """The same as a row to learn from, whose weights are 1 where it is learned."""
    ids, mask = answer_row(chat, prompt, text)
    return Datum(tokens=ids[:-1], targets=ids[1:], weights=mask[1:].astype(float), name=prompt.uid)


def answers_of(prompt: Prompt, *, pairs: bool) -> list[tuple[str, bool]]:
    """The answers of a prompt of preferences, each with whether it was liked: chosen and rejected or, unless `pairs`
    are needed, one with its label. Raises UserError."""
    chosen, rejected, single = (prompt.extra.get(name) for name in ("chosen", "rejected", "completion"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        return [(chosen, True), (rejected, False)]
    if not pairs and isinstance(single, str):
        return [(single, bool(prompt.extra.get("label")))]
    wanted = "'chosen' and 'rejected'" + ("" if pairs else ", or 'completion' and 'label'")
    what = "; a single completion is for preference.loss=kto" if isinstance(single, str) else ""
    raise UserError(f"no {wanted} to learn from{what}; such rows come with env.name=preference (experiment=dpo)")


def reward_row(chat: Chat, prompt: Prompt, text: str) -> Ints:
    """Ids [L] of a conversation as a reward model reads it, training and judging alike. Raises UserError."""
    try:
        chat.prompt(prompt.messages)  # says what is wrong with them in its own words
        return np.asarray(
            conversation_ids(chat.tokenizer, [*prompt.messages, {"role": "assistant", "content": text}])["input_ids"]
        )
    except UserError:
        raise
    except Exception as error:  # of a template
        raise UserError(f"the chat template refuses this conversation: {' '.join(str(error).split())[:200]}") from error


def rows_of(cfg: RunConfig) -> RowsOf | None:
    """What makes every row that cfg.trainer needs of a prompt, to be checked before the first step; None where prompt
    and solution are all."""
    if cfg.trainer == "dpo":
        pairs = cfg.preference.loss != "kto"
        return lambda chat, prompt: [answer_row(chat, prompt, text)[0] for text, _ in answers_of(prompt, pairs=pairs)]
    if cfg.trainer == "reward_model":
        return lambda chat, prompt: [reward_row(chat, prompt, text) for text, _ in answers_of(prompt, pairs=True)]
    return None
