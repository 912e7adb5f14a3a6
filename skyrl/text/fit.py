"""Holds every prompt of a run against its chat template and the longest row, before anything is played.

A run that finds a prompt that cannot be played in its thousandth step has lost a night, and again at each restart.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.data import make_splits
from skyrl.envs.wrappers import make_environment
from skyrl.registry.plugins import import_plugins
from skyrl.text.chat import Chat, chat_of
from skyrl.text.rows import RowsOf, rows_of
from skyrl.types import Prompt, UserError

CHUNK = 512
SPARE = 8  # tokens that a tokenizer may add to a text
TOLD = 3  # problems of one rank whose words are kept
PROGRESS_SECONDS = 5.0
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Unfit:
    """A prompt that cannot be played or learned from. `kind` is what data.filter calls it; "" = never left out."""

    split: str
    index: int
    kind: str
    problem: str


@dataclass(frozen=True)
class PromptCheck:
    """What is asked of the prompts of a split: `longest` prompt in tokens and the option that says so; with `learned`,
    which says what to do without them, their solutions are rows of supervised training, of at most `row_tokens`."""

    split: str
    longest: int
    option: str
    row_tokens: int
    learned: str = ""
    rows: RowsOf | None = None

    @classmethod
    def of(cls, cfg: RunConfig, split: str, row_tokens: int) -> PromptCheck:
        """That of a run whose rows have at most row_tokens."""
        limit = cfg.data.max_prompt_tokens
        if 0 < limit < row_tokens:
            longest, option = limit, f"above data.max_prompt_tokens={limit}"
        else:
            longest, option = row_tokens - 1, f"and rows of {row_tokens} must have room for an answer"
        supervised = "set warmup.num_steps=0" if cfg.warmup.num_steps else ""
        if cfg.trainer == "distill" and cfg.distill.on_policy < 1:
            supervised = "set distill.on_policy=1"
        if cfg.trainer == "sft":
            supervised = "leave it out"
        if split != "train" and (cfg.trainer, cfg.env.name) != ("sft", "chat"):
            supervised = ""
        return cls(split, longest, option, row_tokens, supervised, rows_of(cfg))

    def run(
        self, chat: Chat, prompts: Iterable[tuple[int, Prompt]], progress: Progress = lambda done: None
    ) -> list[Unfit]:
        """Those of `prompts` ((index, prompt) pairs) that do not fit. Tokens are counted only where the length of the
        text does not tell that they are few, many texts at once."""
        found: list[Unfit] = []
        rest, done = iter(prompts), 0
        while chunk := list(islice(rest, CHUNK)):
            open_ones = [(index, prompt, text) for index, prompt in chunk if (text := self._read(chat, prompt)) != ""]
            for index, prompt in self._maybe_long(chat, open_ones):
                if problem := self._problem(chat, prompt):
                    kind, words = problem
                    found.append(
                        Unfit(self.split, index, kind, f"{prompt.place}: {words}" if len(found) < TOLD else "")
                    )
            done += len(chunk)
            progress(done)
        return found

    def _read(self, chat: Chat, prompt: Prompt) -> str | None:
        """The whole text of a prompt whose tokens have to be counted, "" when it is short enough without, None when it
        is empty or cannot be read."""
        if chat.unread_field(prompt.extra) or self.rows is not None:
            return None
        try:
            text = chat.render(prompt.messages)
        except UserError:
            return None
        whole = text + str(prompt.extra.get("solution", "")) if self.learned else text
        limit = min(self.longest, self.row_tokens - SPARE)
        known = chat.vocab_size == 0 or len(chat.tokenizer) <= chat.vocab_size
        # A token is at least one character of an ASCII text. Blank texts may have no token at all.
        short = whole.isascii() and len(whole) + SPARE <= limit and known and any(c.isalnum() for c in text[:64])
        return "" if short and not (self.learned and not prompt.extra.get("solution")) else whole or None

    def _maybe_long(
        self, chat: Chat, open_ones: Sequence[tuple[int, Prompt, str | None]]
    ) -> Iterable[tuple[int, Prompt]]:
        """Those whose tokens, counted for many texts at once, do not tell that they fit."""
        texts = [text for _, _, text in open_ones if text]
        try:
            counted: Any = chat.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ()
        except (TypeError, ValueError):  # a text that is none is among them
            counted = [[]] * len(texts)
        rows = iter(counted)
        for index, prompt, text in open_ones:
            ids = next(rows) if text else []
            fits = 0 < len(ids) and len(ids) + SPARE <= min(self.longest, self.row_tokens)
            fits &= chat.vocab_size == 0 or max(ids, default=0) < chat.vocab_size
            if not fits or (self.learned and not prompt.extra.get("solution")):
                yield index, prompt

    def _problem(self, chat: Chat, prompt: Prompt) -> tuple[str, str] | None:
        """(kind, words) of what is wrong with one prompt, exactly as it will be played."""
        if unread := chat.unread_field(prompt.extra):
            return "refused", unread
        try:
            count = len(chat.prompt(prompt.messages))
            if count == 0:
                return "empty", "the prompt has no tokens, nothing for a model to go on; write it, or leave it out"
            if count > self.longest:
                return "too_long", f"{count} tokens, {self.option}; shorten it, leave it out, or raise that limit"
            if self.rows is not None and (most := max(map(len, self.rows(chat, prompt)))) > self.row_tokens:
                words = f"{most} tokens with an answer, and rows end at {self.row_tokens}"
                return "too_long", f"{words}; shorten it, leave it out, or raise batch.max_row_tokens"
            if not self.learned:
                return None
            solution = prompt.extra.get("solution")
            if not isinstance(solution, str):
                field = "`completion`" if prompt.env == "chat" else "`solution`"
                return "", f"no solution to learn from; give it one, or {self.learned} (its field is {field})"
            count += len(chat.answer(prompt.messages, solution))
        except UserError as error:
            return "refused", str(error)
        if count > self.row_tokens:
            words = f"{count} tokens with its solution, and rows end at {self.row_tokens}"
            return "too_long", f"{words}; shorten it, leave it out, or raise batch.max_row_tokens"
        return None


def leave_out(
    cfg: RunConfig, split: str, prompts: Sequence[Prompt], found: Sequence[Unfit]
) -> tuple[Sequence[Prompt], str]:
    """`prompts` without those that data.filter leaves out, and a line that counts them ("" for none).

    `found` is of all ranks. Raises UserError, naming the first by its place, for one that is not to be left out, and
    when nothing would be left."""
    mine = sorted((one for one in found if one.split == split), key=lambda one: one.index)
    allowed = set(cfg.data.filter)
    kept = [one for one in mine if not one.kind or not allowed & {one.kind, "all"}]
    if kept:
        told = next((one for one in kept if one.problem), kept[0])
        more = f" ({len(kept) - 1} more like it)" if len(kept) > 1 else ""
        advice = f", or data.filter=[{told.kind}] leaves such prompts out" if told.kind else ""
        raise UserError(f"{told.problem}{advice}{more}")
    if not mine:
        return prompts, ""
    gone = {one.index for one in mine}
    left = [prompt for index, prompt in enumerate(prompts) if index not in gone]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(one.kind for one in mine).items()))
    line = f"left out {len(gone)} of {len(prompts)} {split} prompts ({kinds}), first {mine[0].problem}"
    if not left:
        raise UserError(f"data.filter={cfg.data.filter}: {line}; no prompts are left")
    return left, line


def say_progress(what: str, total: int, say: Callable[[str], None]) -> Progress:
    """A Progress that says how far `what` is, from PROGRESS_SECONDS on and as often."""
    begun = last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done} of {total} in {last - begun:.0f} s")

    return progress


Parts = tuple[dict[str, Sequence[Prompt]], str]


def check_task(
    cfg: RunConfig, row_tokens: int, *, files: bool, prompts: Callable[[RunConfig], Parts] = make_splits
) -> tuple[list[str], Chat | None]:
    """What a dry run can say of the task: plugins, the environment and its options, and with `files` the prompts as
    they will be played, where `prompts` gives them. Returns lines about what was left out or not looked at, and the
    Chat where it was loaded.

    Raises UserError for what is wrong. Imports plugins, and no torch unless they do.
    """
    import_plugins(cfg.plugins)
    if cfg.env.name:  # an evaluation may have sets alone
        make_environment(cfg.env)
    if not files:
        return [], None
    parts, line = prompts(cfg)
    try:
        chat = chat_of(cfg)
    except ImportError as error:
        return [f"prompts are not held against the tokenizer: {error}"], None
    lines = [line]
    for split, part in parts.items():
        kept = part if cfg.data.filter or split == "train" else part[: cfg.eval.num_prompts]
        found = PromptCheck.of(cfg, split, row_tokens).run(chat, enumerate(kept))
        lines.append(leave_out(cfg, split, kept, found)[1])
    return [line for line in lines if line], chat
