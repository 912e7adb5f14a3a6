"""Questions that are answered by searching a corpus of local texts over several turns."""

from __future__ import annotations

import functools
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Split, register_environment
from skyrl.envs.data_files import read_examples
from skyrl.registry import import_extra
from skyrl.tasks.base import Tasks, TurnedTask, field_of, require_counts, require_weights, staged, wrong_field
from skyrl.types import Message, Metrics, Prompt, UserError

COMMAND = re.compile(r"^[ \t]*(search|answer)[ \t]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
FORM = "write one line: search: <words>, or answer: <answer>\n"
MAX_QUERY_WORDS = 64
K1, B = 1.5, 0.75  # of BM25: how soon a word counts no more, and how much long texts are marked down
Retrieve = Callable[[str, int], list[int]]  # words of a query, how many texts -> their numbers, best first


@register_environment("search")
class Search(TurnedTask):
    """The model writes "search: <words>", reads the texts that are found, and ends with "answer: <answer>".

    Rows of data.path have "prompt" or "messages" and "answer", a text or a list of those that are right. corpus: a file
    whose rows have "text" and may have "title". Without it: invented people and towns, and questions about them.

    index: "bm25" is our own, in Python, for some ten thousand texts; "bm25s" the package, for millions. top_k: texts
    that one search shows; max_characters: of each. right, found: what the right answer adds to the reward, and what a
    search that has shown a right answer does. Answers are compared without case, articles, punctuation. A turn that is
    neither search nor answer is counted, and answered with how to write one; of several lines the last counts.
    """

    in_process = True

    def __init__(
        self,
        *,
        corpus: Path | None = None,
        index: Literal["bm25", "bm25s"] = "bm25",
        top_k: int = 3,
        max_characters: int = 500,
        right: float = 1.0,
        found: float = 0.0,
        max_turns: int = 4,
    ) -> None:
        super().__init__(max_turns)
        require_counts(top_k=top_k, max_characters=max_characters)
        self.weights = require_weights(right=right, found=found)
        self.corpus, self.index, self.top_k, self.max_characters = corpus, index, top_k, max_characters

    @classmethod
    def plays_in_process(cls, options: dict[str, Any]) -> bool:
        """Only over the made corpus, where a search takes a tenth of a millisecond."""
        return super().plays_in_process(options) and not options.get("corpus")

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """As every task, with a corpus for rows of a file, and the made one for the made questions."""
        if bool(data.path) != bool(options.get("corpus")):
            missing = "env.options.corpus: no file of texts" if data.path else "data.path: no file of questions"
            raise UserError(f"{missing} is named; give both, or neither for made texts and questions")
        return super().dataset(options, data, split, seed)

    def prepare(self) -> None:
        """Reads the corpus and makes its index."""
        _retriever(self.corpus, self.index)

    def made(self) -> Tasks:
        """Questions about invented people and towns."""
        return _made()[1]

    def check(self, prompt: Prompt) -> None:
        """There is an answer that can be given."""
        if not all(map(normalised, answers_of(prompt))):
            raise wrong_field(prompt, "answer", "more than articles and signs")

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts with the question."""
        self.searches = self.malformed = 0
        self.shown = self.right = False
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """Searches, or takes the answer."""
        commands = COMMAND.findall(text)
        if not commands:
            self.malformed += 1
            return FORM
        name, words = commands[-1]
        wanted = [normalised(answer) for answer in answers_of(self.prompt)]
        if name.lower() == "answer":
            self.right = normalised(words) in wanted
            return None
        self.searches += 1
        texts = texts_of(self.corpus)
        found = [texts[one][: self.max_characters] for one in _retriever(self.corpus, self.index)(words, self.top_k)]
        self.shown |= any(f" {answer} " in f" {normalised(one)} " for one in found for answer in wanted)
        return "".join(f"[{number}] {one}\n" for number, one in enumerate(found, 1)) or "nothing found\n"

    def score(self) -> tuple[float, Metrics]:
        """Reward, and how the model has searched."""
        stages = {"right": float(self.right), "found": float(self.shown)}
        reward, metrics = staged(self.weights, stages, self.right)
        return reward, {**metrics, "searches:mean": float(self.searches), "malformed:mean": float(self.malformed)}


def answers_of(prompt: Prompt) -> list[str]:
    """The right answers of a row. Raises UserError with file:line."""
    value = field_of(prompt, "answer", (str, int, float, list), "a text, or a list of texts that are right")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in values):
        raise wrong_field(prompt, "answer", "a text, or a list of texts that are right")
    return [str(one) for one in values]


def normalised(text: str) -> str:
    """A text in lower case without punctuation, articles and spaces that do not matter, as SQuAD compares answers."""
    bare = unicodedata.normalize("NFKC", text).lower().translate(_signs())
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


@functools.cache
def _signs() -> dict[int, str]:
    """Punctuation and symbols of all scripts, to be spaces."""
    return {code: " " for code in range(0x10000) if unicodedata.category(chr(code))[0] in "PS"}


@functools.lru_cache(4)
def texts_of(corpus: Path | None) -> list[str]:
    """The texts of a corpus, each behind its title; None: the made ones. Raises UserError with file:line."""
    if corpus is None:
        return _made()[0]
    rows = list(read_examples(corpus))
    return [f"{row.text('title')}: {row.text('text')}" if "title" in row.fields else row.text("text") for row in rows]


@functools.lru_cache(4)
def _retriever(corpus: Path | None, index: str) -> Retrieve:
    texts = texts_of(corpus)
    if index == "bm25":
        return bm25([normalised(text).split() for text in texts])
    otherwise = "take index=bm25, for up to some ten thousand texts"
    bm25s = import_extra("bm25s", "env.options.index='bm25s'", "search", otherwise)
    searcher, quiet = bm25s.BM25(k1=K1, b=B), {"show_progress": False}
    searcher.index(bm25s.tokenize([normalised(text) for text in texts], stopwords=None, **quiet), **quiet)

    def retrieve(query: str, count: int) -> list[int]:
        words = bm25s.tokenize([normalised(query)], stopwords=None, **quiet)
        numbers, scores = searcher.retrieve(words, k=min(count, len(texts)), n_threads=1, **quiet)
        return [int(number) for number, score in zip(numbers[0], scores[0], strict=True) if score > 0]

    return retrieve


def bm25(texts: Sequence[Sequence[str]]) -> Retrieve:
    """Okapi BM25 over texts that are lists of words; ties go to the earlier text."""
    mean = sum(map(len, texts)) / len(texts)
    places: dict[str, dict[int, float]] = {}
    for number, words in enumerate(texts):
        for word, count in Counter(words).items():
            weight = count * (K1 + 1) / (count + K1 * (1 - B + B * len(words) / mean))
            places.setdefault(word, {})[number] = weight

    def retrieve(query: str, count: int) -> list[int]:
        scores: dict[int, float] = defaultdict(float)
        for word in normalised(query).split()[:MAX_QUERY_WORDS]:
            found = places.get(word, {})
            rarity = math.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
            for number, weight in found.items():
                scores[number] += rarity * weight
        return sorted(scores, key=lambda number: (-scores[number], number))[:count]

    return retrieve


STARTS, ENDS = "Bran Cal Dor Fen Gal Hol Kel Lin Mar Nor".split(), "by dale ford ham mere stad ton wick".split()
GIVEN, WORK = "Ada Bea Cora Dora Ella Finn Gus Hugo Ivan Jon".split(), "baker pilot judge nurse".split()


@functools.cache
def _made() -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Texts about invented towns and people, and questions; every third needs two of the texts."""
    rng = random.Random("skyrl.search")
    towns = [start + end for start in STARTS for end in ENDS]
    rivers = {town: f"river {rng.choice(STARTS)}a" for town in towns}
    texts = [f"{town} lies on the {river}." for town, river in rivers.items()]
    tasks: list[tuple[str, dict[str, Any]]] = []
    for name in (f"{given} {start}son" for given in GIVEN for start in STARTS):
        town, work = rng.choice(towns), rng.choice(WORK)
        texts.append(f"{name} was born in {town} and is a {work}.")
        facts = {f"Where was {name} born?": town, f"What is the work of {name}?": work}
        facts[f"On which river was {name} born?"] = rivers[town]
        tasks += [(f"{question}\n{FORM}", {"answer": answer}) for question, answer in facts.items()]
    return texts, tasks
