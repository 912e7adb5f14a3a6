"""Rewards that compare characters, and for the form of an answer, whatever its value."""

from __future__ import annotations

import re

from skyrl.answers.equal import parse_number, unwrap
from skyrl.envs.rewards.base import reference, register_reward
from skyrl.types import Prompt


@register_reward("exact", answer=True)
def exact(text: str, prompt: Prompt) -> float:
    """1.0 when the text is the answer, character by character, apart from white space around it; else 0.0."""
    return float(text.strip() == reference(prompt).strip())


@register_reward("characters", answer=True)
def characters(text: str, prompt: Prompt) -> float:
    """Part of the positions with the right character, 0.0 to 1.0; 1.0 only for the exact answer.

    Positions are counted over the longer of the two, so too long is as wrong as too short. A dense signal for short
    answers such as digits.
    """
    given, wanted = text.strip(), reference(prompt).strip()
    longer = max(len(given), len(wanted))
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / longer if longer else 1.0


@register_reward("last_digits", answer=True)
def last_digits(text: str, prompt: Prompt) -> float:
    """1.0 when the last run of digits in the text is the answer, else half of `characters` of that run: a dense signal
    for a model that writes around its numbers, in which the whole answer is worth more than any part of it."""
    numbers = re.findall(r"[0-9]+", text)
    part = characters(numbers[-1], prompt) if numbers else 0.0
    return part if part == 1.0 else part / 2


def is_digits(text: str) -> bool:
    """Whether the text, apart from white space around it, is a row of ASCII digits and nothing else."""
    stripped = text.strip()
    return stripped.isascii() and stripped.isdigit()


@register_reward("format")
def final_line(text: str, prompt: Prompt) -> float:
    """1.0 when "####" stands once and a number follows it as the end of the text; else 0.0."""
    del prompt
    match = re.search(r"####[ \t]*(\S[^\n]*?)\s*\Z", text)
    return float(text.count("####") == 1 and match is not None and parse_number(unwrap(match[1])) is not None)
