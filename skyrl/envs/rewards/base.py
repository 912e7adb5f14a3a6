"""Reward functions by name: text and prompt in, one number out."""

from __future__ import annotations

from collections.abc import Callable

from skyrl.registry import Registry
from skyrl.types import Prompt, UserError

RewardFunction = Callable[[str, Prompt], float]

REWARDS: Registry[RewardFunction] = Registry("reward")
ANSWERED: set[str] = set()  # rewards that compare with the row's answer, which is looked at before anything is played


def register_reward(name: str, *, answer: bool = False) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: makes `fn(text, prompt) -> float` known to single-turn environments as env.options.reward=<name>.

    `text` is what the model wrote, without the stop token. The number must be finite; what happens on an error or a
    hang is guard.py's business, so let errors out. answer: it reads `reference(prompt)`; a row without an answer is
    then refused at the start. Raises UserError when the name is taken.
    """
    if answer:
        ANSWERED.add(name)
    return REWARDS.register(name)


def reference(prompt: Prompt) -> str:
    """The right answer, prompt.extra["answer"] as text. Raises UserError when the prompt has none, or one that no text
    can equal: a list, NaN, blank text."""
    answer = prompt.extra.get("answer")
    if answer is None:
        raise UserError(f"{prompt.place}: field 'answer' is missing, and this reward needs it")
    if isinstance(answer, (dict, list, bytes)) or not str(answer).strip() or answer != answer:
        raise UserError(f"{prompt.place}: field 'answer' is {str(answer)[:60]!r}, wanted a text or a number")
    return str(answer)
