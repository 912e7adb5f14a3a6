"""Reward functions by name: text and prompt in, one number out."""

from __future__ import annotations

from collections.abc import Callable

from skyrl.registry import Registry
from skyrl.types import Prompt, UserError

RewardFunction = Callable[[str, Prompt], float]

REWARDS: Registry[RewardFunction] = Registry("reward")


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: makes `fn(text, prompt) -> float` known to single-turn environments as env.options.reward=<name>.

    `text` is what the model wrote, without the stop token. The number must be finite; what happens on an error or a
    hang is guard.py's business, so let errors out. Raises UserError when the name is taken.
    """
    return REWARDS.register(name)


def reference(prompt: Prompt) -> str:
    """The right answer, prompt.extra["answer"] as text. Raises UserError when the prompt has none."""
    answer = prompt.extra.get("answer")
    if answer is None:
        source = f" ({prompt.extra['source']})" if "source" in prompt.extra else ""
        raise UserError(f"prompt {prompt.uid}{source}: field 'answer' is missing and this reward needs it")
    return str(answer)
