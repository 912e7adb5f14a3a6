"""Rewards for the form of an answer, whatever its value."""

from __future__ import annotations

import re

from skyrl.envs.rewards.base import register_reward
from skyrl.envs.rewards.math import parse_number, unwrap
from skyrl.types import Prompt

_LAST_LINE = re.compile(r"####[ \t]*(\S[^\n]*?)\s*\Z")


def is_digits(text: str) -> bool:
    """Whether the text, apart from white space around it, is a row of ASCII digits and nothing else."""
    stripped = text.strip()
    return stripped.isascii() and stripped.isdigit()


@register_reward("format")
def final_line(text: str, prompt: Prompt) -> float:
    """1.0 when "####" stands once and a number follows it as the end of the text; else 0.0."""
    del prompt
    match = _LAST_LINE.search(text)
    return float(text.count("####") == 1 and match is not None and parse_number(unwrap(match.group(1))) is not None)
