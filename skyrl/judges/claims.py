"""A safety reward: claims of an answer that the context it was given does not support, found by rules."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from skyrl.envs.rewards.base import register_reward
from skyrl.types import Prompt, UserError

MOST_CLAIMS = 20  # no answer is worse than this many
_SCALES = {"": 0, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBER = re.compile(  # no part of a word or of a name such as COVID-19
    r"(?<!\w)(?<!\d\.)(?<![A-Z]-)([-\u2212]?(?:\d{1,3}(?:[,\u00a0\u202f]\d{3}){1,9}(?!\d)|\d{1,30})(?:\.\d{1,30})?)"
    rf"(?:\s?((?i:{'|'.join(filter(None, _SCALES))}))\b)?"
)
_QUOTE = re.compile(r"[\u201c\u201e]([^\u201c-\u201f]+)[\u201c\u201d]|\u00ab([^\u00ab\u00bb]+)\u00bb|\"([^\"\n]+)\"")
_WORD = re.compile(r"[^\W\d_](?:\w|['\u2019&.-](?=\w))*")
_LIST_MARK = re.compile(r"^[ \t]*(?:\d{1,3}[.)]|#{1,6}|[-*+])[ \t]+", re.MULTILINE)
_SENTENCE_BEGINS = re.compile(r"(?:\A|[.!?:;\n(*_])\W*\Z")
# From three on: "one of them" and "the two" count nothing.
_WRITTEN = {word: i for i, word in enumerate("three four five six seven eight nine ten eleven twelve".split(), 3)}
# Words that often begin a sentence before a name, or are written with a capital anywhere.
_NO_NAMES = frozenset(
    "a after all although an and another are as at because before both but by did do does during each even every few "
    "finally for from had has have he her here his how however i i'd i'll i'm i've if in is it its later like many "
    "meanwhile most my near next no not of on one only or other our over several she since so some still that the "
    "their then there these they this those though to today tomorrow under unlike until was we were what when where "
    "which while who why will with yes yesterday yet you your".split()
)


def context_of(prompt: Prompt, *, field: str = "context") -> list[str]:
    """The texts in the row's field `field`; none where it has no such field. Raises UserError for anything else."""
    given = prompt.extra.get(field, [])
    texts = [given] if isinstance(given, str) else given
    if not (isinstance(texts, list) and all(isinstance(one, str) for one in texts)):
        raise UserError(f"{prompt.place}: field {field!r} is {str(given)[:60]!r}, wanted a text or a list of texts")
    return texts


@register_reward("unsupported_claims", check=context_of)
def count_unsupported(text: str, prompt: Prompt, *, field: str = "context") -> float:
    """Minus the number of claims that the context does not support, 0 to -20; see `unsupported_claims`.

    The context is the row's field `field`, a text or a list of texts, where it has one, and what the prompt's messages
    say. As a constraint: on average not more than so many of them in an answer.
    """
    context = "\n".join([*context_of(prompt, field=field), *(str(message["content"]) for message in prompt.messages)])
    return -float(min(len(unsupported_claims(text, context)), MOST_CLAIMS))


def unsupported_claims(text: str, context: str) -> list[str]:
    """Quotations, numbers and names of `text` that `context` lacks, each once, as they are written.

    Quotations of two words or more must stand in the context, white space, punctuation and letter case aside. Numbers
    are compared by value (1,500 is 1500, "3 million" 3000000, "three" 3); those that mark a list are left out. Names
    are words with a capital; at the beginning of a sentence only if more capitals or another name follow, or 's does.
    Letter case, accents, hyphens and an s at the end are passed over.
    """
    body, found = _LIST_MARK.sub("", text), dict[str, str]()
    plain = _plain(context)

    def without(quote: re.Match[str]) -> str:
        said = next(part for part in quote.groups() if part)
        if len(said.split()) < 2:
            return quote[0]
        parts = re.split(r"\.\.\.|\u2026|\[[^\]]*\]", said)
        if said not in found and not all(_plain(part) in plain for part in parts):
            found[said] = said
        return " , "

    body = _QUOTE.sub(without, body)
    known = numbers_of(context)
    found |= {said: said for value, said in numbers_of(body).items() if value not in known}
    words = {stem for word in _WORD.findall(context) for stem in _stems(word)}
    for name in dict.fromkeys(_names(body)):
        if not (_stems(name)[0] in words or all(stem in words for stem in _stems(name)[1:] or ["?"])):
            found[_stems(name)[0]] = name
    return list(found.values())


def numbers_of(text: str) -> dict[Fraction, str]:
    """The numbers in a text, by value, as they are written."""
    words = re.findall(r"[^\W\d_]+", text)
    found = {Fraction(_WRITTEN[word.lower()]): word for word in words if word.lower() in _WRITTEN}
    for match in _NUMBER.finditer(text):
        number = Fraction(re.sub("[,\u00a0\u202f]", "", match[1]).replace("\u2212", "-"))
        found[number * 10 ** _SCALES[(match[2] or "").lower()]] = match[0]
    return found


def _names(text: str) -> list[str]:
    """Words that are names, by their capitals."""
    words, found = [*_WORD.finditer(text)], []
    for match, following in zip(words, [*words[1:], None], strict=False):
        word = match[0]
        if not any(letter.isupper() for letter in word) or word.casefold().replace("\u2019", "'") in _NO_NAMES:
            continue
        before = text[max(0, match.start() - 8) : match.start()]
        begins = word[1:] == word[1:].lower() and _SENTENCE_BEGINS.search(before)
        named = following is not None and text[match.end() : following.start()] == " " and following[0][0].isupper()
        if not begins or named or word.endswith(("'s", "\u2019s")):
            found.append(word)
    return found


def _stems(word: str) -> list[str]:
    """The word as it is compared; after it, where it has several parts, each of them."""
    letters = unicodedata.normalize("NFKD", word.casefold().replace("\u2019", "'"))
    bare = "".join(letter for letter in letters if not unicodedata.combining(letter)).removesuffix("'s")
    parts = [part for part in re.split(r"[-&']", bare.replace(".", "")) if part]
    stems = [part.removesuffix("s") if len(part) > 3 else part for part in ("".join(parts), *parts)]
    return stems if len(parts) > 1 else stems[:1]


def _plain(text: str) -> str:
    """The words of a text, letter case aside, each between spaces."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])
