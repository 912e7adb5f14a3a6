"""Rewards for mathematical answers, and where a text gives its final answer. What equality means: skyrl/answers/."""

from __future__ import annotations

import re

from skyrl.answers.equal import BOX, answers_equal, closing, parse_number, unwrap
from skyrl.envs.rewards.base import reference, register_reward
from skyrl.types import Prompt

MAX_HEADINGS = 50
_ANYWHERE = re.compile(
    r"(?<![\w.])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-\u2212]?\.\d+", re.A
)
_MARKED = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_BARE = re.compile(r"\\(?:boxed|fbox)\s?(\d[^\s{}$\\]*|[A-Za-z](?![A-Za-z]))")  # \boxed 7
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]{2,}")
_WITH_UNIT = re.compile(r"[^\sA-Za-z]*\d(?:\s+[a-z][\w/]*){1,4}\.?")


def extract_answer(text: str) -> str | None:
    """What the text gives as its final answer, unwrapped, or None: the content of the last \\boxed{}, or what the last
    line with "####" after it has. Numbers elsewhere do not count; last_number finds those.

    A heading of markdown is no answer: "####" before words, when more text follows or a box came before.
    """
    boxes = [*BOX.finditer(text)]
    start = boxes[-1].end() if boxes else -1
    end = closing(text, start) if boxes else -1
    boxed = unwrap(text[start + 1 : end]) if end >= 0 else ""
    for bare in _BARE.finditer(text, max(start, 0)):
        boxed, end = bare[1].rstrip(".,;:"), bare.end()
    for match in [*_MARKED.finditer(text, max(end, 0))][: -MAX_HEADINGS - 1 : -1]:
        line = next((part for part in reversed(re.split("#{4,}", match[1])) if part.strip()), "")
        answer = unwrap(line)
        prose = _PROSE.search(re.sub(r"\\[a-z]+\{[^{}]*\}", "", answer)) and not _WITH_UNIT.fullmatch(answer)
        if answer and not (prose and (boxed or text[match.end() :].strip())):
            return answer
    return boxed or None


def last_number(text: str) -> str | None:
    """The last number written anywhere in the text, or None. Lenient: a text that stops early still has one."""
    found = _ANYWHERE.findall(text)
    return found[-1] if found else None


@register_reward("math", answer=True)
def math_reward(text: str, prompt: Prompt) -> float:
    """1.0 when the final answer ("#### x" or \\boxed{x}) equals the prompt's; else 0.0."""
    answer = extract_answer(text)
    return float(answer is not None and answers_equal(answer, reference(prompt)))


@register_reward("math_last_number", answer=True)
def math_last_number(text: str, prompt: Prompt) -> float:
    """Like "math", but a text without a marked answer is judged by the last number in it."""
    answer = extract_answer(text) or last_number(text)
    return float(answer is not None and answers_equal(answer, reference(prompt)))


@register_reward("number", answer=True)
def number(text: str, prompt: Prompt) -> float:
    """1.0 when the whole text is one number with the answer's exact value (".50" for "0.5"); else 0.0."""
    value = parse_number(text)
    return float(value is not None and value == parse_number(reference(prompt)))
