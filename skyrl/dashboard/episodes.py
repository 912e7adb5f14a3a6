"""Dumped episodes for eyes: found by reward, prompt, step and flag; their tokens with what the run said of each."""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from skyrl.run_dir import RunReader

SHOWN_CHARACTERS = 600  # of a prompt and of an answer: kept in memory, searched, and shown in lists
KEPT_DUMPS = 200
# Text that deflate makes smaller than this part of it says the same again and again; prose and code stay above 0.3.
REPETITIVE, REPETITION_CHARACTERS = 0.16, 200
SAME_ANSWERS = 3  # different prompts with one paid answer
FLAGS = {
    "repetition": "says the same again and again: its text compresses to less than a sixth",
    "truncation": "a token limit ended it",
    "reward hacking?": "called wrong and paid like right answers, or one answer that is paid for several prompts",
    "invalid": "its verifier failed",
}


@dataclass
class EpisodeSummary:
    """One line of a dump, without its tokens. `start`: the byte where the line begins in its rank's part."""

    dump: str
    rank: int
    start: int
    uid: str
    index: int
    reward: float
    stop: str
    tokens: int
    turns: int
    prompt: str
    answer: str
    advantage: float | None = None
    flags: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The step that it was played in."""
        return int(self.dump.rpartition("-")[2])

    @property
    def kind(self) -> str:
        """ "train", or what the dump is called: "eval"."""
        return self.dump.rpartition("-")[0] or "train"


def summaries(run: RunReader, dump: str) -> list[EpisodeSummary]:
    """Every episode of a dump, in its order, with its flags and, where it was trained on, the mean advantage of its
    tokens. Dumps that were looked at last are remembered."""
    files = [file for path in run.dump_files(dump) for file in path.parent.glob(f"{path.name}*")]
    told = [path.stat() for path in files]
    return _summaries(run, dump, tuple((one.st_size, one.st_mtime_ns) for one in told))


@lru_cache(maxsize=KEPT_DUMPS)
def _summaries(run: RunReader, dump: str, stamp: Any) -> list[EpisodeSummary]:
    found: list[EpisodeSummary] = []
    correct: list[float | None] = []
    rows = run.trained(dump)
    for rank, start, episode in run.episodes(dump):
        turns = episode["turns"]
        answer = "\n".join(str(turn["text"]) for turn in turns)
        one = EpisodeSummary(
            dump=dump,
            rank=rank,
            start=start,
            uid=str(episode.get("uid", "")),
            index=int(episode.get("index", 0)),
            reward=_finite(episode.get("reward")),
            stop=str(episode.get("stop", "")),
            tokens=sum(len(turn.get("tokens", ())) for turn in turns),
            turns=len(turns),
            prompt=str(turns[0].get("context_text", ""))[-SHOWN_CHARACTERS:] if turns else "",
            answer=answer[:SHOWN_CHARACTERS],
        )
        row = rows.get(f"{one.uid}/{one.index}/0") or {}
        if known := [value for value in row.get("advantages", ()) if value is not None]:
            one.advantage = sum(known) / len(known)
        cut = any(stop == "length" for stop in (one.stop, *(turn.get("stop") for turn in turns)))
        told = {"truncation": cut, "repetition": is_repetitive(answer), "invalid": bool(episode.get("invalid"))}
        one.flags += [flag for flag, there in told.items() if there]
        correct.append((episode.get("metrics") or {}).get("correct:mean"))
        found.append(one)
    _flag_hacking(found, correct)
    return found


def is_repetitive(text: str) -> bool:
    """Whether a text of some length says the same again and again."""
    data = text.encode("utf-8", "replace")[:100_000]
    return len(data) >= REPETITION_CHARACTERS and len(zlib.compress(data, 6)) < REPETITIVE * len(data)


def _flag_hacking(found: list[EpisodeSummary], correct: list[float | None]) -> None:
    """What may be a hole in the reward: an answer that the environment calls wrong is paid as well as half of the right
    ones of the dump; or one answer, of some words, is paid for several prompts."""
    right = [one.reward for one, value in zip(found, correct, strict=True) if value is not None and value > 0]
    enough = float(np.median(right)) if right else math.inf
    prompts: dict[str, set[str]] = defaultdict(set)
    for one in found:
        if one.reward > 0 and len(one.answer.split()) >= 4:
            prompts[one.answer].add(one.uid)
    for one, value in zip(found, correct, strict=True):
        wrong = value is not None and value <= 0 and one.reward > 0 and one.reward >= enough
        if wrong or (one.reward > 0 and len(prompts[one.answer]) >= SAME_ANSWERS):
            one.flags.append("reward hacking?")


@dataclass
class Query:
    """What is looked for among episodes; "" and None leave a part open."""

    text: str = ""
    uid: str = ""
    flag: str = ""
    least: float | None = None
    most: float | None = None
    order: str = ""

    def fits(self, one: EpisodeSummary) -> bool:
        """Whether an episode is looked for."""
        least, most = (-math.inf if self.least is None else self.least), (math.inf if self.most is None else self.most)
        bounded = self.least is not None or self.most is not None  # a reward that is not a number lies nowhere
        flagged = not self.flag or self.flag in one.flags or (self.flag == "any" and bool(one.flags))
        text = f"{one.uid} {one.prompt} {one.answer}".lower()
        found = self.uid in ("", one.uid) and all(word in text for word in self.text.lower().split())
        return flagged and found and (not bounded or least <= one.reward <= most)

    def pick(self, found: list[EpisodeSummary]) -> list[EpisodeSummary]:
        """Those that fit, in the order that is asked for."""
        orders: dict[str, Any] = {"best": lambda one: -one.reward, "worst": lambda one: one.reward}
        orders["longest"] = lambda one: -one.tokens
        return sorted(filter(self.fits, found), key=orders.get(self.order, lambda one: 0))


@dataclass
class TokenSpan:
    """A piece of text with how it is drawn (`tone`, a class of the style sheet) and what is said of it."""

    text: str
    tone: str = ""
    title: str = ""


def add_trained(episode: dict[str, Any], rows: dict[str, Any]) -> None:
    """Gives each turn "advantages" and "trained", the trainer's log-probs, of its tokens, None where a token has none.
    rows: from `RunReader.trained`."""
    known, part = None, -1
    for turn in episode["turns"]:
        context, tokens = turn["context"], turn["tokens"]
        part += bool(tokens) and (known is None or context[: len(known)] != known)  # as rollout.to_rows cuts rows
        known = context + tokens if tokens else known
        row = rows.get(f"{episode['uid']}/{episode['index']}/{part}") or {"first": 0}
        start = len(context) - 1 - row["first"]
        for name, values in (("advantages", row.get("advantages", ())), ("trained", row.get("logprobs", ()))):
            turn[name] = [values[i] if 0 <= i < len(values) else None for i in range(start, start + len(tokens))]


def turn_spans(turn: dict[str, Any], texts: dict[int, str], colour: str) -> list[TokenSpan]:
    """The text of a turn (after add_trained), token by token with their tones; one span without tones where the tokens'
    texts are not known. colour: "logprob", "advantage", "gap" or "none"."""
    text, tokens = str(turn.get("text", "")), turn.get("tokens") or []
    logprobs = turn.get("logprobs") or []
    if colour == "none" or not tokens or any(token not in texts for token in tokens):
        return [TokenSpan(text)]
    spans, at = [], 0
    for place, token in enumerate(tokens):
        # A token alone may read otherwise than in its text: a space less before it, or half of a letter.
        piece = re.sub("\ufffd", "", texts[token])
        found = text.find(piece, at, at + len(piece) + 4) if piece else -1
        end = found + len(piece) if found >= 0 else at
        if place == len(tokens) - 1:
            end = len(text)
        value = logprobs[place] if place < len(logprobs) else None
        advantage, trained = turn["advantages"][place], turn["trained"][place]
        gap = None if value is None or trained is None else value - trained
        said = _title(token, value, advantage) + (f", sampler above trainer by {gap:+.2g}" if gap is not None else "")
        spans.append(TokenSpan(text[at:end], tone_of(value, advantage, colour, gap), said))
        at = end
    return spans


def tone_of(logprob: Any, advantage: float | None, colour: str, gap: float | None = None) -> str:
    """A class of the style sheet: "lp0" (certain) to "lp6" (e^-6 and less); for a gap "lp0" (1e-4 nats and less) to
    "lp6" (0.1 and more); "ad-3" to "ad3" for advantages to 1.5."""
    if colour == "gap":
        return "" if gap is None else f"lp{max(0, min(6, round(2 * math.log10(max(abs(gap), 1e-9)) + 8)))}"
    if colour == "advantage":
        return "" if advantage is None else f"ad{round(max(-3.0, min(3.0, 2 * advantage)))}"
    if not isinstance(logprob, (int, float)) or not math.isfinite(logprob):
        return ""
    return f"lp{min(6, int(-min(0.0, logprob) + 0.5))}"


def _title(token: int, logprob: Any, advantage: float | None) -> str:
    said = f"token {token}"
    if isinstance(logprob, (int, float)) and math.isfinite(logprob):
        said += f", log-prob {logprob:.3f} (probability {math.exp(min(0.0, logprob)):.3g})"
    return said if advantage is None else f"{said}, advantage {advantage:+.3f}"


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
