"""Overlap of an answer with reference texts: ROUGE-L and chrF, the better one where there are several references."""

from __future__ import annotations

import functools
import re
from collections import Counter

from skyrl.envs.rewards.base import register_reward
from skyrl.judges.models import references
from skyrl.types import Prompt

CHARACTER_ORDER, BETA = 6, 2.0  # of chrF (Popovic 2015): n-grams up to this n; recall counts so many times as precision


@register_reward("rouge_l", check=references)
def rouge_l(text: str, prompt: Prompt, *, corpus: str = "") -> float:
    """F1 of the longest common subsequence of words, letter case aside (ROUGE-L), 0 to 1.

    corpus: a data file of reference texts, field `text`; "" = the row's `references` or `answer`.
    """
    words, best = re.findall(r"\w+", text.casefold()), 0.0
    for other in references(prompt, corpus):
        wanted = re.findall(r"\w+", other.casefold())
        best = max(best, 2 * common_subsequence(words, wanted) / max(1, len(words) + len(wanted)))
    return best


@register_reward("chrf", check=references)
def chrf(text: str, prompt: Prompt, *, corpus: str = "") -> float:
    """F2 of common n-grams of 1 to 6 characters, white space left out (chrF), 0 to 1: nearer to what a reader calls
    alike than words are, in any language.

    corpus: a data file of reference texts, field `text`; "" = the row's `references` or `answer`.
    """
    given = character_ngrams.__wrapped__(text)  # a few MB of a long answer: references alone are kept
    return max(_f_score(given, character_ngrams(other)) for other in references(prompt, corpus))


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence: one addition of long numbers for each word of `b` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = everything = (1 << len(a)) - 1
    for word in b:
        common = row & places.get(word, 0)
        row = (row + common | row - common) & everything
    return len(a) - row.bit_count()


@functools.lru_cache(maxsize=4096)
def character_ngrams(text: str) -> tuple[Counter[str], ...]:
    """How often each n-gram of characters comes, for n = 1 to 6."""
    packed, orders = "".join(text.split()), range(1, CHARACTER_ORDER + 1)
    return tuple(Counter(packed[i : i + n] for i in range(len(packed) - n + 1)) for n in orders)


def _f_score(given: tuple[Counter[str], ...], wanted: tuple[Counter[str], ...]) -> float:
    """Precision and recall are means over those n of which both texts have n-grams."""
    pairs = [(a, b, (a & b).total()) for a, b in zip(given, wanted, strict=True) if a and b]
    if not pairs or not pairs[0][2]:
        return 0.0
    precision = sum(common / a.total() for a, _, common in pairs) / len(pairs)
    recall = sum(common / b.total() for _, b, common in pairs) / len(pairs)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
